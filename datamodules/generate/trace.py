"""Traces: generated accesses to a table's rows with the LRU hit rates of a real column, for caches of any size.

A generated trace takes in each phase of a profile (see ``datamodules.generate.profiles``) exactly as many new rows, at
random places, and draws its other distances from the phase's histogram; an LRU stack turns them into rows. So it has
the original's LRU hit rate at any cache size, and its distinct rows, after any number of accesses. Both ideas, except
phases, are those of the trace generator of Naumov et al. 2019, whose new rows come at one rate from beginning to end.

A trace shorter than the original is like the original's beginning. A longer one continues with the distances of the
last octave, and with new rows by the power law (Heaps' law) of the last octave, until it has seen the whole table.
After that it only draws distances; if the original never accessed a row twice, the trace repeats all rows in order.

Memory is that of the LRU stacks (see ``lru``) of all columns together and a block of accesses, for any number of
accesses. Traces depend on the profile and the seed alone, to the last bit; a shorter trace is the beginning of a longer
one.

``measure_fit`` says how well a generated trace repeats its original column, ``plot_fits`` draws it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.generate.draws import stream
from datamodules.generate.folder import SEED_RANGE, cache_folder, check_settings, make_once, rows_of_splits
from datamodules.generate.profiles import CLASS_LOW, Profile, TraceSource, lru_stack, phase_end
from datamodules.generate.random import chance_scores, dense_block, label_block
from datamodules.writer import DatasetWriter
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.figures import save_figure
from lightning_dlrm.contracts.schema import Column, DatasetSchema, Split
from lightning_dlrm.contracts.terminal import counted

GENERATOR_VERSION = 1
"""Incremented if the same profile and seed would give other rows."""

BLOCK_ACCESSES = 65_536
"""Accesses that share a random stream."""

_ACCESSES = 7  # purpose of random streams
_NEVER = 2**31 - 1
_CLASS_WIDTH = np.diff(CLASS_LOW, append=2**31)

CACHE_SHARES = (0.001, 0.01, 0.1, 0.5)
"""Sizes of the LRU caches whose hit rates are compared, as shares of the original's distinct rows."""


class TraceGenerator:
    """Generates the trace of a profile, block by block.

    Args:
        profile: whose trace.
        seed: 0 to 2**64 - 1.
        number: of the column, so that equal profiles give different traces.

    Raises:
        UserError: numba is not installed.
    """

    def __init__(self, profile: Profile, seed: int, number: int = 0) -> None:
        self._stack = lru_stack()
        self._seed, self._number, self._block = seed, number, 0
        self._phases = profile.phases()
        self._left = self._new = 0
        """Remaining accesses of the current phase, and how many of them find new rows."""

    @property
    def distinct(self) -> int:
        """Rows accessed so far."""
        return self._stack.depth

    def next_block(self) -> NDArray[np.int32]:
        """Return the rows of the next BLOCK_ACCESSES accesses, int32 [BLOCK_ACCESSES]."""
        words = stream(self._seed, _ACCESSES, self._number, 0, self._block).random_raw(2 * BLOCK_ACCESSES)
        chance, half = words[:BLOCK_ACCESSES] >> np.uint64(12), words[BLOCK_ACCESSES:]
        place, choice = half >> np.uint64(32), half & np.uint64(2**32 - 1)
        if not self._block:
            choice[0] = 0  # the very first access is to a new row
        self._block += 1
        distances, done = np.empty(BLOCK_ACCESSES, dtype=np.int32), 0
        while done < BLOCK_ACCESSES:
            if not self._left:
                self._begin_phase()
            now = slice(done, done + min(self._left, BLOCK_ACCESSES - done))
            distances[now] = self._draw(chance[now], place[now])
            new = self._stack.choose(choice[now], self._left, self._new)
            distances[now][new] = 0
            self._left -= len(new)
            self._new -= int(new.sum())
            done = now.stop
        return self._stack.accesses(distances)

    def _begin_phase(self) -> None:
        self._left, counts = next(self._phases)
        self._new = int(counts[0])
        self._cumulative = np.cumsum(counts[1:])

    def _draw(self, chance: NDArray[np.uint64], place: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return distances of the current phase from 52 and 32 random bits each; see ``lru`` on distances beyond the
        depth."""
        total = int(self._cumulative[-1])
        if not total:
            return np.full(len(chance), _NEVER, dtype=np.int64)
        count = np.minimum(chance * (total * 2.0**-52), total - 1).astype(np.int64)
        classes = np.searchsorted(self._cumulative, count, side="right") + 1
        within = (place * _CLASS_WIDTH[classes].astype(np.uint64)) >> np.uint64(32)
        return CLASS_LOW[classes] + within.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """Settings of rows that each have one id from every trace."""

    train_rows: int
    """Rows of the training split: as many accesses of every column."""
    validation_rows: int = 65_536
    """Rows of the validation split, whose accesses follow those of the training split; 0 for none."""
    test_rows: int = 65_536
    """Rows of the test split, whose accesses follow; 0 for none."""
    dense: int = 13
    """Dense features, I1 and on, standard normal."""
    click_rate: float = 0.25
    """Chance of label 1."""
    seed: int = 0
    """Of the rows, 0 to 2**64 - 1."""

    def __post_init__(self) -> None:
        counts = ("train_rows", "validation_rows", "test_rows", "dense")
        check_settings("trace data", self, {name: (getattr(self, name) >= 0, "0 or more") for name in counts})
        require(rows_of_splits(self), "trace data: no split has rows; give train_rows, validation_rows or test_rows")
        checks = {
            "click_rate": (0 < self.click_rate < 1, "a probability between 0 and 1"),
            "seed": (0 <= self.seed < 2**64, SEED_RANGE),
        }
        check_settings("trace data", self, checks)


def trace_schema(source: TraceSource, settings: TraceSettings) -> DatasetSchema:
    """Return the schema of traces without profiling or generating: without files and positives."""
    return DatasetSchema(
        dataset="trace",
        protocol="trace",
        columns=(
            Column(name="label", role="label"),
            *(
                Column(name=f"I{i + 1}", role="dense", transform="standard normal")
                for i in range(settings.dense)
            ),
            *(Column(name=name, role="categorical", cardinality=rows) for name, rows in source.tables.items()),
        ),
        splits={name: Split(rows=rows) for name, rows in rows_of_splits(settings).items()},
        settings={
            "generator_version": GENERATOR_VERSION,
            "source": source.identity,
            "click_rate": settings.click_rate,
            "seed": settings.seed,
        },
    )  # fmt: skip


def trace_folder(source: TraceSource, settings: TraceSettings) -> Path:
    """Return the folder of this dataset in the cache, whether it exists or not."""
    return cache_folder("trace", [trace_schema(source, settings).encoding_fingerprint, rows_of_splits(settings)])


def generate_trace(
    source: TraceSource,
    settings: TraceSettings,
    folder: Path,
    progress: bool = True,
    profiles: Sequence[Profile] | None = None,
) -> DatasetSchema:
    """Write a dataset of traces, whole or not at all, or find it written already; see ``make_once``.

    Args:
        source: whose profiles.
        settings: how many rows, and what else is in them.
        folder: the dataset folder to make.
        progress: show progress bars, on a terminal.
        profiles: those of the source, where they are known already.
    """

    def write(writer: DatasetWriter, bar: Any) -> dict[str, Any]:
        traces = {
            profile.column: TraceGenerator(profile, settings.seed, number)
            for number, profile in enumerate(profiles or source.profiles(progress))
        }
        ends = np.cumsum(list(rows_of_splits(settings).values())).tolist()
        for start in range(0, ends[-1], BLOCK_ACCESSES):
            number, size = start // BLOCK_ACCESSES, min(BLOCK_ACCESSES, ends[-1] - start)
            # The splits are one sequence.
            block: dict[str, Any] = {
                "label": label_block(settings.click_rate, settings.seed, 0, number, size),
                **{f"I{i + 1}": dense_block(settings.seed, i, 0, number, size) for i in range(settings.dense)},
                **{name: trace.next_block()[:size] for name, trace in traces.items()},
            }
            for (split, rows), end in zip(rows_of_splits(settings).items(), ends, strict=True):
                first, last = max(end - rows - start, 0), min(end - start, size)
                if first < last:
                    writer.write(split, {name: values[first:last] for name, values in block.items()})
            bar.update(size)
        return {"optimum": dict.fromkeys(rows_of_splits(settings), chance_scores(settings.click_rate))}

    return make_once(trace_schema(source, settings), folder, write, progress)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A column's trace, original against generated, over the accesses that both have."""

    column: str
    accesses: str
    """The compared accesses in words, such as ``the first 16,000 of 100,000 generated accesses``."""
    distinct: tuple[int, int]
    """Rows accessed by the original and by the generated trace."""
    distance_error: float
    """Largest difference between the two distribution functions of stack distances (Kolmogorov-Smirnov), first
    accesses counting as infinite distances."""
    variation: float
    """Share of the accesses that would have to move to another octave of distances (total variation)."""
    caches: tuple[tuple[int, float, float], ...]
    """Rows of an LRU cache, and its hit rates for the original and for the generated trace."""


def measure_fit(original: Profile, generated: Profile) -> Fit:
    """Compare two profiles over the accesses of the shorter one, in which the longer one should have the end of a
    phase: see ``Profiler``."""
    accesses = min(original.accesses, generated.accesses)
    counts = [profile.beginning(accesses) for profile in (original, generated)]
    distribution = [np.cumsum(part[1:]) / accesses for part in counts]
    octave = np.frexp(CLASS_LOW)[1]  # 0 for first accesses
    octaves = [np.bincount(octave, part) / accesses for part in counts]
    caches: dict[int, tuple[int, float, float]] = {}
    for share in CACHE_SHARES:
        # A class ends just below the beginning of the next: a cache of that size hits all accesses of the class.
        last = int(np.searchsorted(CLASS_LOW, max(share * counts[0][0], 1), side="right")) - 1
        rows = int(CLASS_LOW[last + 1]) - 1 if last + 1 < len(CLASS_LOW) else int(CLASS_LOW[last])
        caches[rows] = (rows, float(distribution[0][last - 1]), float(distribution[1][last - 1]))
    return Fit(
        column=original.column,
        accesses=_compared(original, generated),
        distinct=(round(counts[0][0]), round(counts[1][0])),
        distance_error=float(np.abs(distribution[0] - distribution[1]).max()),
        variation=float(np.abs(octaves[0] - octaves[1]).sum() / 2),
        caches=tuple(caches.values()),
    )


def _compared(original: Profile, generated: Profile) -> str:
    """Return which accesses two profiles both have."""
    few, many = sorted((original.accesses, generated.accesses))
    if few == many:
        return f"{few:,} accesses"
    return f"the first {few:,} of {many:,} {'original' if many == original.accesses else 'generated'} accesses"


def render_fits(fits: Sequence[Fit]) -> str:
    """Format the fits as text, one block a column."""
    return "\n".join(
        line
        for fit in fits
        for line in (
            f"{fit.column}: {fit.accesses}; original / generated",
            f"  unique rows       {fit.distinct[0]:>13,} / {fit.distinct[1]:,}",
            "  stack distances   LRU hit rates of caches of any size differ by at most",
            f"                    {100 * fit.distance_error:.2f} percentage points;",
            f"                    {fit.variation:.2%} of the distances are in another range 2^n to 2^(n+1)",
            *(
                f"  LRU hit rate      {first:>13.2%} / {second:.2%} with {counted(rows, 'row')}"
                for rows, first, second in fit.caches
            ),
        )
    )


def plot_fits(originals: Sequence[Profile], generated: Sequence[Profile], source: str, path: Path) -> None:
    """Draw stack distances, hit rates and distinct rows of each column, original and generated.

    Args:
        originals, generated: profiles of the same columns, in the same order.
        source: name of the original data.
        path: the picture, such as a .png or .pdf.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(13, 3.6 * len(originals) + 0.8), layout="constrained")
    title = "in a good fit, each dashed line covers its thick line"
    figure.suptitle(f"Accesses of {source}, original and generated: {title}", x=0.01, ha="left", weight="bold")
    parts = figure.subfigures(len(originals), 1, squeeze=False)[:, 0]
    for part, original, copy in zip(parts, originals, generated, strict=True):
        part.suptitle(f"{original.column}: {_compared(original, copy)}", x=0.01, ha="left", weight="bold", fontsize=11)
        row = part.subplots(1, 3)
        accesses = min(original.accesses, copy.accesses)
        for profile, name, style in (
            (original, "original", {"color": "#56B4E9", "linewidth": 4}),
            (copy, "generated", {"color": "#D55E00", "linewidth": 1.4, "linestyle": "--"}),
        ):
            _draw(row, profile, accesses, {"label": name, **style})
        distances, hits, distinct = row
        distances.set(xscale="log", ylim=(0, None), xlabel="stack distance, rows", ylabel="accesses, %")
        first = original.beginning(accesses)[0] / accesses
        hits.axhline(100 * (1 - first), color="0.45", linestyle=":", linewidth=1.2)
        share = "under 0.1%" if first < 0.001 else f"{first:.1%}"
        note = f"{share} are first accesses to a row: no cache serves them"
        hits.annotate(note, (0.02, 100 * (1 - first)), (0, 3), ("axes fraction", "data"), "offset points", fontsize=7.5)
        hits.set(
            xscale="log", ylim=(0, 110), yticks=range(0, 101, 20), xlabel="rows in the LRU cache", ylabel="hits, %"
        )
        distinct.set(xscale="log", yscale="log", xlabel="accesses", ylabel="unique rows")
        distinct.yaxis.set_major_formatter("{x:,.0f}")
        distinct.yaxis.set_minor_formatter(LogFormatter())  # of a small table: 24, not 2.4 times ten to the 1
        distances.set_title("stack distances, in ranges 2^n to 2^(n+1)", loc="left")
        hits.set_title("hit rate of an LRU cache", loc="left")
        distinct.set_title("unique rows", loc="left")
        for ax in row:
            ax.grid(color="0.92")
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
            if ax.get_xlim()[1] < 20 * ax.get_xlim()[0]:  # of a small table: 1, 2, 4, 8
                ax.xaxis.set_major_locator(LogLocator(2))
                ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter("{x:,.0f}")
        part.legend(*distinct.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    save_figure(figure, path, 110)


def _draw(row: Sequence[Any], profile: Profile, accesses: int, style: dict[str, Any]) -> None:
    counts = profile.beginning(accesses)
    octave = np.frexp(CLASS_LOW[1:])[1]
    percent = 100 * np.bincount(octave, counts[1:])[1:] / accesses
    shown = np.flatnonzero(counts[1:])[-1] + 1 if counts[1:].any() else 1
    octaves = int(octave[shown - 1])
    row[0].step(
        2.0 ** np.arange(octaves + 1), np.append(percent[:octaves], percent[octaves - 1]), where="post", **style
    )
    ends = CLASS_LOW[2 : shown + 2] - 1
    row[1].plot(ends, 100 * np.cumsum(counts[1 : len(ends) + 1]) / accesses, **style)
    knots = [phase_end(phase) for phase in range(len(profile.counts)) if phase_end(phase) < accesses]
    row[2].plot([*knots, accesses], [profile.beginning(knot)[0] for knot in (*knots, accesses)], **style)

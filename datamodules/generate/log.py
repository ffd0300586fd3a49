"""Raw click logs in the forms of public data sets, with a planted click model, to try schemas on.

Columns, separators, file names and the format of the values are those of the data set; the values are drawn. A click's
log-odds are the sum of an effect of its user, one of its item, one of the pair of their groups, and one of the hour (or
the price); every column but the random ones follows from user, item or time. A row is a function of (form, seed, rows,
position): equal on every machine.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv

from datamodules.generate.demo import best_scores
from datamodules.generate.draws import exp, stream, uniforms
from datamodules.generate.folder import SEED_RANGE, check_settings
from datamodules.generate.tsv import TsvSettings, text_blocks, whole_file
from datamodules.mixing import GOLDEN, mix
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE, Optimum

_BLOCK_ROWS = 65_536
_ROWS, _COLUMN = 11, 12  # purposes of random streams
_USER, _ITEM, _PAIR, _NUMBER = 1, 2, 3, 4  # salts of effects
_GROUPS = 8  # of users and of items, whose pairs have effects
_DEVIATIONS = {_USER: 0.8, _ITEM: 0.8, _PAIR: 0.6, _NUMBER: 0.3}

Values: TypeAlias = NDArray[Any] | pa.Array
Columns: TypeAlias = dict[str, Values]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a log, before they get the form of a data set."""

    form: "LogForm"
    seed: int
    start: int
    stop: int
    total: int

    @cached_property
    def _uniforms(self) -> NDArray[np.float64]:
        drawn = uniforms(stream(self.seed, _ROWS, self.start // _BLOCK_ROWS), 5 * (self.stop - self.start))
        return drawn.reshape(-1, 5).T

    @property
    def position(self) -> NDArray[np.int64]:
        return np.arange(self.start, self.stop)

    @cached_property
    def user(self) -> NDArray[np.int64]:
        """Users, from 0, few of whom have most of the rows."""
        return _skewed(self._uniforms[0], self.form.users)

    @cached_property
    def item(self) -> NDArray[np.int64]:
        return _skewed(self._uniforms[1], self.form.items)

    @cached_property
    def time(self) -> NDArray[np.float64]:
        """Seconds since the epoch: ascending, or in any order if the data set is shuffled."""
        share = self._uniforms[2] if self.form.shuffled else (self.position + self._uniforms[2]) / self.total
        first, last = self.form.times
        return first + share * (last - first)

    @cached_property
    def number(self) -> NDArray[np.float64]:
        """A number from 0 to 1 that has an effect."""
        return self._uniforms[3]

    @cached_property
    def probability(self) -> NDArray[np.float64]:
        """The probability of label 1."""
        pair = attribute(self.user, _GROUPS, _PAIR) * _GROUPS + attribute(self.item, _GROUPS, _PAIR)
        log_odds = self.form.bias + _DEVIATIONS[_NUMBER] * np.sqrt(12) * (0.5 - self.number)
        for salt, values in ((_USER, self.user), (_ITEM, self.item), (_PAIR, pair)):
            log_odds = log_odds + _DEVIATIONS[salt] * _effect(values, salt)
        return 1.0 / (1.0 + exp(-log_odds))

    @cached_property
    def label(self) -> NDArray[np.int8]:
        return (self._uniforms[4] < self.probability).astype(np.int8)

    def uniform(self, number: int) -> NDArray[np.float64]:
        """Return random numbers of no effect, others for each ``number``."""
        drawn = stream(self.seed, _COLUMN, number, self.start // _BLOCK_ROWS)
        return uniforms(drawn, self.stop - self.start)

    def clock(self, form: str) -> pa.Array:
        """Return the times as text, in UTC."""
        return pc.strftime(pa.array(self.time.astype(np.int64), pa.timestamp("s")), form)


@dataclass(frozen=True, kw_only=True)
class LogForm:
    """The form of a data set."""

    files: Mapping[str, float]
    """Name -> share of the rows, in order."""
    columns: Callable[[Rows], Columns]
    users: int = 20_000
    items: int = 5_000
    times: tuple[int, int] = (1_413_849_600, 1_414_713_600)
    """The first second, and the one after the last."""
    shuffled: bool = False
    separator: str = ","
    header: bool = True
    bias: float = -1.2
    about: str = ""


def attribute(ids: NDArray[np.int64], values: int, salt: int) -> NDArray[np.int64]:
    """Return for each id one of so many values, always the same."""
    return (mix(ids.astype(np.uint64) + np.uint64(salt * GOLDEN % 2**64)) % np.uint64(values)).astype(np.int64)


def _skewed(uniform: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return ids from 0 whose frequency falls as 1 / (id + 1)."""
    return np.minimum(exp(uniform * np.log(count + 1)) - 1, count - 1).astype(np.int64)


def _effect(ids: NDArray[np.int64], salt: int) -> NDArray[np.float64]:
    """Return for each id the sum of four uniforms, of mean 0 and variance 1."""
    bits = mix(ids.astype(np.uint64) + np.uint64((salt + 100) * GOLDEN % 2**64))
    parts = sum(((bits >> np.uint64(16 * k)) & np.uint64(0xFFFF)).astype(np.float64) for k in range(4))
    return (np.asarray(parts) / 2**16 - 2.0) * np.sqrt(3.0)


def _hash(ids: NDArray[np.int64], salt: int) -> pa.Array:
    """Return 8 hexadecimal digits for each id."""
    unique, inverse = np.unique(ids, return_inverse=True)
    bits = mix(unique.astype(np.uint64) + np.uint64((salt + 200) * GOLDEN % 2**64)) >> np.uint64(32)
    return pa.array([f"{value:08x}" for value in bits.tolist()]).take(pa.array(inverse))


def _avazu(rows: Rows) -> Columns:
    user, item = rows.user, rows.item
    return {
        "id": (np.uint64(10**19) + mix(rows.position.astype(np.uint64)) % np.uint64(8 * 10**18)),
        "click": rows.label,
        "hour": rows.clock("%y%m%d%H"),
        "C1": 1001 + attribute(item, 7, 10),
        "banner_pos": attribute(item, 7, 11),
        "site_id": _hash(attribute(item, 2_000, 12), 12),
        "site_domain": _hash(attribute(item, 1_500, 13), 13),
        "site_category": _hash(attribute(item, 26, 14), 14),
        "app_id": _hash(attribute(item, 3_000, 15), 15),
        "app_domain": _hash(attribute(item, 300, 16), 16),
        "app_category": _hash(attribute(item, 36, 17), 17),
        "device_id": _hash(user, 18),
        "device_ip": _hash(user * 4 + (rows.uniform(0) * 4).astype(np.int64), 19),
        "device_model": _hash(attribute(user, 4_000, 20), 20),
        "device_type": attribute(user, 5, 21),
        "device_conn_type": attribute(user, 4, 22),
        "C14": 375 + item,
        "C15": np.array([320, 300, 216, 728, 120, 1024, 480, 768])[attribute(item, 8, 24)],
        "C16": np.array([50, 250, 36, 480, 90, 20, 768, 320, 1024])[attribute(item, 9, 25)],
        "C17": 112 + attribute(item, 435, 26),
        "C18": attribute(item, 4, 27),
        "C19": 33 + attribute(item, 68, 28),
        "C20": np.where(rows.uniform(1) < 0.45, -1, 100_000 + attribute(item, 172, 29)),
        "C21": np.minimum((rows.number * 60).astype(np.int64), 59) + 1,
    }


def _avazu_x1(rows: Rows) -> Columns:
    codes = [attribute(rows.user, 900 + 37 * number, 40 + number) for number in range(10)]
    codes += [attribute(rows.item, 400 + 53 * number, 60 + number) for number in range(10)]
    codes += [rows.user, rows.item]
    return {"label": rows.label, **{f"feat_{number}": code for number, code in enumerate(codes, 1)}}


def _criteo_x1(rows: Rows) -> Columns:
    columns: Columns = {"label": rows.label}
    for number, name in enumerate(CRITEO_DENSE):
        columns[name] = np.round(rows.number if number == 0 else rows.uniform(number), 8)
    for number, name in enumerate(CRITEO_CATEGORICAL):
        side = rows.user if number % 2 else rows.item
        columns[name] = side if number in (2, 3) else attribute(side, 10 + 40 * number, 80 + number)
    return columns


def _ratings(rows: Rows, names: Sequence[str], step: float) -> Columns:
    """Return ratings of users one after the other: 4 stars or more where the label is 1."""
    steps = 1.0 / step
    liked = 4.0 + step * np.floor(rows.uniform(0) * (steps + 1))
    other = step + step * np.floor(rows.uniform(0) * (4 * steps - 1))
    stars = np.where(rows.label == 1, liked, other)
    order = np.argsort(rows.user, kind="stable")
    rating = pa.array([f"{value:.1f}" for value in stars]) if step < 1 else stars.astype(np.int64)
    values = (rows.user + 1, rows.item + 1, rating, rows.time.astype(np.int64))
    return {name: pa.array(value).take(order) for name, value in zip(names, values, strict=True)}


def _kuairand(rows: Rows) -> Columns:
    click = rows.label
    duration = np.round(exp(9.0 + 2.5 * (attribute(rows.item, 1_000, 30) / 1_000))).astype(np.int64)
    watched = np.round(duration * rows.uniform(0) * (0.1 + 0.9 * click)).astype(np.int64)
    rare = {name: (rows.uniform(number + 1) < 0.02) & (click == 1) for number, name in enumerate(_KUAIRAND_SIGNALS)}
    return {
        "user_id": rows.user,
        "video_id": rows.item,
        "date": rows.clock("%Y%m%d"),
        "hourmin": pa.array([int(text) * 100 for text in rows.clock("%H").to_pylist()]),
        "time_ms": np.round(rows.time * 1e3).astype(np.int64),
        "is_click": click,
        **{name: signal.astype(np.int8) for name, signal in rare.items()},
        "long_view": (watched > 0.8 * duration).astype(np.int8),
        "play_time_ms": watched,
        "duration_ms": duration,
        "profile_stay_time": np.zeros(len(click), np.int8),
        "comment_stay_time": np.zeros(len(click), np.int8),
        "is_profile_enter": np.zeros(len(click), np.int8),
        "is_rand": np.zeros(len(click), np.int8),
        "tab": attribute(rows.user, 15, 31),
    }


_KUAIRAND_SIGNALS = ("is_like", "is_follow", "is_comment", "is_forward", "is_hate")


def _shop(rows: Rows) -> Columns:
    return {
        "time": rows.clock("%Y-%m-%d %H:%M:%S"),
        "user": rows.user,
        "item": pa.array([f"item{number}" for number in rows.item.tolist()]),
        "price": np.round(exp(4.0 * rows.number), 2),
        "clicked": rows.label,
    }


_X1, _X4 = (0.72, 0.18, 0.1), (0.8, 0.1, 0.1)
_BARS_FILES = ("train.csv", "valid.csv", "test.csv")


def _bars(shares: Sequence[float]) -> dict[str, float]:
    return dict(zip(_BARS_FILES, shares, strict=True))


FORMS: Mapping[str, LogForm] = {
    "shop": LogForm(
        files={"clicks.csv": 1.0},
        columns=_shop,
        users=2_000,
        items=500,
        times=(1_767_225_600, 1_769_817_600),
        about="five columns: time, user, item, price, clicked",
    ),
    "avazu": LogForm(files={"train": 1.0}, columns=_avazu, about="Kaggle's Avazu, in order of time"),
    "avazu_x1": LogForm(files=_bars((0.7, 0.1, 0.2)), columns=_avazu_x1, shuffled=True, about="BARS Avazu_x1"),
    "avazu_x4": LogForm(files=_bars(_X4), columns=_avazu, shuffled=True, about="BARS Avazu_x4"),
    "criteo_x1": LogForm(files=_bars(_X1), columns=_criteo_x1, shuffled=True, about="BARS Criteo_x1"),
    "criteo_x4": LogForm(files=_bars(_X4), columns=lambda rows: {}, about="BARS Criteo_x4"),
    "movielens_1m": LogForm(
        files={"ratings.dat": 1.0},
        columns=lambda rows: _ratings(rows, ("user", "item", "rating", "time"), step=1.0),
        users=6_040,
        items=3_952,
        times=(956_703_932, 1_046_454_590),
        shuffled=True,
        separator="::",
        header=False,
        bias=0.3,
        about="MovieLens 1M",
    ),
    "movielens_20m": LogForm(
        files={"ratings.csv": 1.0},
        columns=lambda rows: _ratings(rows, ("userId", "movieId", "rating", "timestamp"), step=0.5),
        times=(789_652_009, 1_427_784_002),
        shuffled=True,
        bias=0.0,
        about="MovieLens 20M",
    ),
    "kuairand_pure": LogForm(
        files={"log_standard_4_08_to_4_21_pure.csv": 0.8, "log_standard_4_22_to_5_08_pure.csv": 0.2},
        columns=_kuairand,
        items=7_583,
        times=(1_649_376_000, 1_652_054_400),
        about="KuaiRand-Pure, the logs of the standard policies",
    ),
}


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """Settings of a raw log."""

    form: str
    rows: int
    """Rows of all files together."""
    seed: int = 0
    """Of the rows, 0 to 2**64 - 1; the planted model does not depend on it."""

    def __post_init__(self) -> None:
        files = len(FORMS[self.form].files) if self.form in FORMS else 1
        checks = {
            "form": (self.form in FORMS, f"one of {', '.join(FORMS)}"),
            "rows": (self.rows >= 10 * files, f"at least {10 * files}"),
            "seed": (0 <= self.seed < 2**64, SEED_RANGE),
        }
        check_settings("log", self, checks)


@dataclass(frozen=True, kw_only=True)
class GeneratedLog:
    """A raw log on disk."""

    files: tuple[Path, ...]
    best: Optimum
    """The best scores that a model can expect on these rows."""


@dataclass(frozen=True)
class _Block:
    """Consecutive rows as lines of text, without a header."""

    lines: list[bytes]
    label: NDArray[np.int8]
    probability: NDArray[np.float64]


def generate_log(settings: LogSettings, folder: Path) -> GeneratedLog:
    """Write a raw log into a folder, each file whole or not at all.

    Memory grows by 9 bytes a row, for the best scores.

    Raises:
        UserError: a file exists already, or cannot be written.
    """
    form = FORMS[settings.form]
    require(not Path(folder).is_file(), f"{folder} is a file; name a folder for the files of the log")
    paths = tuple(Path(folder) / name for name in form.files)
    for path in paths:
        require(not path.exists(), f"{path} exists; name another folder, or remove it if it is not needed")
    header = form.separator.join(_names(settings)) + "\n" if form.header else ""
    ends = np.round(settings.rows * np.cumsum([0.0, *form.files.values()])).astype(int).tolist()
    blocks = _criteo_x4_blocks(settings) if settings.form == "criteo_x4" else _blocks(form, settings)
    lines: list[bytes] = []
    labels: list[NDArray[np.int8]] = []
    probabilities: list[NDArray[np.float64]] = []
    for path, start, end in zip(paths, ends, ends[1:], strict=False):
        left = end - start
        with whole_file(path) as write:
            write(header.encode())
            while left:
                if not lines:
                    block = next(blocks)
                    lines = block.lines
                    labels.append(block.label)
                    probabilities.append(block.probability)
                taken, lines = lines[:left], lines[left:]
                write(b"".join(taken))
                left -= len(taken)
    best = best_scores(np.concatenate(labels), np.concatenate(probabilities))
    return GeneratedLog(files=paths, best=best)


def _names(settings: LogSettings) -> Sequence[str]:
    if settings.form == "criteo_x4":
        return ("Label", *CRITEO_DENSE, *CRITEO_CATEGORICAL)
    return list(FORMS[settings.form].columns(Rows(FORMS[settings.form], settings.seed, 0, 1, settings.rows)))


def _blocks(form: LogForm, settings: LogSettings) -> Iterator[_Block]:
    options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    for start in range(0, settings.rows, _BLOCK_ROWS):
        rows = Rows(form, settings.seed, start, min(start + _BLOCK_ROWS, settings.rows), settings.rows)
        text = io.BytesIO()
        csv.write_csv(pa.table(form.columns(rows)), text, options)
        lines = text.getvalue().replace(b"\t", form.separator.encode()).splitlines(keepends=True)
        yield _Block(lines, rows.label, rows.probability)


def _criteo_x4_blocks(settings: LogSettings) -> Iterator[_Block]:
    for draw, text, _ in text_blocks(TsvSettings(rows=settings.rows, seed=settings.seed)):
        yield _Block(text.replace(b"\t", b",").splitlines(keepends=True), draw.label, draw.probability)

"""Raw text shaped like Criteo's click logs, to try and measure everything from TSV to a trained model.

A line is ``label \\t I1..I13 \\t C1..C26``: 0 or 1, 13 integers, 26 hashes of 8 hexadecimal digits, and nothing where
a value is missing. Values and labels come from the planted click model of ``datamodules.generate.demo`` under laws like
those of Kaggle or Terabyte, so a model that is trained on them has something to learn.

The distinct ids of a large column go on growing with the rows: it draws from so many that about as many are seen in
45,840,617 rows (Terabyte: 4,373,472,329) as in the real data, most of them once or twice. (The uniforms behind the
draws have 32 bits, so beyond a billion rows somewhat fewer are seen.) An id's hash is the same under every seed.

A row is a function of (dataset, seed, position): equal on every machine, fewer rows are the beginning of more, and it
does not matter over how many files they are spread.
"""

import dataclasses
import gzip
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.generate import demo
from datamodules.generate.demo import AD, BLOCK_ROWS, VISITOR, Draw, Feature, PlantedModel
from datamodules.generate.folder import SEED_RANGE, check_settings, checked_estimate
from datamodules.preprocess.journal import written_aside
from datamodules.preprocess.report import mark_of
from lightning_dlrm.contracts.disk import write_fault
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE
from lightning_dlrm.contracts.terminal import counted

TsvDataset = Literal["kaggle", "terabyte"]
TSV_DATASETS: tuple[TsvDataset, ...] = get_args(TsvDataset)

TERABYTE_CARDINALITIES = (
    227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956, 405282, 10,
    2209, 11938, 155, 4, 976, 14, 292775614, 40790948, 187188510, 590152, 12973, 108, 36,
)  # fmt: skip

# name: (side, share missing, scale, largest count, share of its side's taste); shares as in the first rows of day 0
_TERABYTE_DENSE = {
    "I1": (VISITOR, 0.24, 4.0, 65_535, 0),
    "I2": (AD, 0.10, 60.0, 65_535, 2),
    "I3": (VISITOR, 0.25, 8.0, 130, 0),
    "I4": (AD, 0.49, 30.0, 65_535, 0),
    "I5": (VISITOR, 0.46, 8.0, 2_547, 0),
    "I6": (AD, 0.09, 3.0, 222, 2),
    "I7": (VISITOR, 0.03, 1.0, 30, 3),
    "I8": (AD, 0.0, 40.0, 4_852, 2),
    "I9": (VISITOR, 0.0, 4.0, 60, 2),
    "I10": (AD, 0.09, 0.7, 9, 0),
    "I11": (VISITOR, 0.46, 4.0, 108, 0),
    "I12": (AD, 0.02, 2_000.0, 65_535, 3),
    "I13": (VISITOR, 0.25, 8.0, 362, 2),
}
# name: (side, share missing, scale, share of its side's taste)
_TERABYTE_CATEGORICAL = {
    "C1": (VISITOR, 0.026, 3.0, 1),
    "C2": (AD, 0.0, 6.0, 0),
    "C3": (VISITOR, 0.0, 6.0, 0),
    "C4": (AD, 0.0, 4.0, 2),
    "C5": (VISITOR, 0.0, 6.0, 0),
    "C6": (AD, 0.0, 1.0, 2),
    "C7": (VISITOR, 0.0, 4.0, 2),
    "C8": (AD, 0.0, 4.0, 2),
    "C9": (VISITOR, 0.0, 2.0, 2),
    "C10": (AD, 0.026, 3.0, 1),
    "C11": (VISITOR, 0.026, 4.0, 0),
    "C12": (AD, 0.0, 4.0, 0),
    "C13": (VISITOR, 0.0, 1.0, 2),
    "C14": (AD, 0.467, 3.0, 0),
    "C15": (VISITOR, 0.0, 6.0, 0),
    "C16": (AD, 0.467, 2.0, 0),
    "C17": (VISITOR, 0.467, 1.0, 0),
    "C18": (AD, 0.0, 3.0, 2),
    "C19": (VISITOR, 0.0, 2.0, 2),
    "C20": (AD, 0.026, 3.0, 1),
    "C21": (VISITOR, 0.026, 3.0, 1),
    "C22": (AD, 0.026, 3.0, 1),
    "C23": (VISITOR, 0.467, 3.0, 0),
    "C24": (AD, 0.0, 6.0, 0),
    "C25": (VISITOR, 0.0, 3.0, 2),
    "C26": (AD, 0.0, 2.0, 2),
}


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """The properties in which Criteo's datasets differ."""

    dense: Mapping[str, tuple[int, float, float, int, int]]
    categorical: Mapping[str, tuple[int, float, float, int]]
    cardinalities: tuple[int, ...]
    """Distinct ids of each column in all of the real rows."""
    drawn_from: dict[str, int]
    """Large columns: the ids that they draw from, of which all the rows show about the cardinality."""
    signed: str
    """The dense column that has negative values too."""
    bias: float


_SHAPES: Mapping[TsvDataset, _Shape] = {
    "kaggle": _Shape(
        dense=demo.KAGGLE_DENSE,
        categorical=demo.KAGGLE_CATEGORICAL,
        cardinalities=demo.KAGGLE_CARDINALITIES,
        drawn_from={
            "C3": 1_422_616_054,
            "C4": 2_821_011,
            "C12": 239_581_846,
            "C16": 24_594_014,
            "C21": 79_534_653,
        },
        signed="I2",
        bias=demo.BIAS,
    ),
    "terabyte": _Shape(
        dense=_TERABYTE_DENSE,
        categorical=_TERABYTE_CATEGORICAL,
        cardinalities=TERABYTE_CARDINALITIES,
        drawn_from={
            "C1": 441_530_231,
            "C10": 160_767_160,
            "C20": 841_462_014,
            "C21": 40_985_710,
            "C22": 294_660_452,
        },
        signed="I8",
        bias=-4.6,
    ),
}
_HEAVY_SQUARINGS = 4  # of the columns of ``drawn_from``

_UNKNOWN_COMPRESSIONS = (".bz2", ".xz", ".zip", ".lz4", ".br")
_GZIP_LEVEL = 1  # level 6 takes three times as long for files a tenth smaller


@dataclass(frozen=True, kw_only=True)
class TsvSettings:
    """Settings of raw text."""

    rows: int
    """Rows of all files together."""
    dataset: TsvDataset = "kaggle"
    seed: int = 0
    """Of the planted model and of the rows, 0 to 2**64 - 1."""

    def __post_init__(self) -> None:
        checks = {
            "rows": (self.rows >= 1, "at least 1"),
            "dataset": (self.dataset in TSV_DATASETS, f"one of {', '.join(TSV_DATASETS)}"),
            "seed": (0 <= self.seed < 2**64, SEED_RANGE),
        }
        check_settings("tsv data", self, checks)


def generate_tsv(settings: TsvSettings, outputs: Sequence[Path], progress: bool = True) -> list[int]:
    """Write raw text into files, each whole or not at all.

    Args:
        settings: what to make.
        outputs: the files, in order; compressed where their names end with .gz or .zst. Rows are spread over them
            equally; if they do not divide evenly, the first files have one row more.
        progress: show a progress bar, on a terminal.

    Returns:
        Bytes of each file.

    Raises:
        UserError: a file exists already, is given twice, would be empty, or cannot be written, or the disk cannot
            hold all.
    """
    outputs = [Path(path) for path in outputs]
    _check_outputs(settings, outputs)
    blocks = ((text, line_ends) for _, text, line_ends in text_blocks(settings))
    start = time.monotonic()
    pending: tuple[bytes, NDArray[np.int64]] = next(blocks)
    estimate = _estimate(settings, outputs, *pending, start)
    if progress:
        print(estimate, file=sys.stderr)
    sizes = []
    with tqdm(
        total=settings.rows,
        desc="Generating",
        unit=" rows",
        unit_scale=True,
        smoothing=0,
        disable=None if progress else True,
    ) as bar:
        if not bar.disable:
            # The rate counts the time of the first block, which was made for the estimate.
            bar.start_t -= time.monotonic() - start
        for number, path in enumerate(outputs):
            wanted = settings.rows // len(outputs) + (number < settings.rows % len(outputs))
            with whole_file(path) as write:
                while wanted:
                    text, line_ends = pending
                    if len(line_ends) == 1:
                        pending = next(blocks)
                        continue
                    taken = min(wanted, len(line_ends) - 1)
                    cut = line_ends[taken] - line_ends[0]
                    write(text[:cut])
                    pending = text[cut:], line_ends[taken:]
                    wanted -= taken
                    bar.update(taken)
            sizes.append(path.stat().st_size)
    return sizes


def _estimate(
    settings: TsvSettings, outputs: Sequence[Path], text: bytes, line_ends: NDArray[np.int64], start: float
) -> str:
    """Describe what all rows will take, from the first block, begun at ``start``; see ``checked_estimate``."""
    sizes = {".gz": len(gzip.compress(text, _GZIP_LEVEL)), ".zst": len(pa.compress(text, "zstd", asbytes=True))}
    times = settings.rows / (len(line_ends) - 1)
    size = sum(sizes.get(path.suffix, len(text)) for path in outputs) / len(outputs) * times
    return checked_estimate(outputs[0], settings.rows, size, (time.monotonic() - start) * times)


def planted_model(settings: TsvSettings) -> PlantedModel:
    """Return the click model of the rows."""
    shape = _SHAPES[settings.dataset]
    sizes = dict(zip(CRITEO_CATEGORICAL, shape.cardinalities, strict=True)) | shape.drawn_from
    ids = {
        name: dataclasses.replace(feature, squarings=_HEAVY_SQUARINGS) if name in shape.drawn_from else feature
        for name, feature in demo.id_features(shape.categorical, sizes).items()
    }
    return PlantedModel.plant_features(settings.seed, demo.dense_features(shape.dense) | ids, shape.bias)


def text_blocks(settings: TsvSettings) -> Iterator[tuple[Draw, bytes, NDArray[np.int64]]]:
    """Yield the rows, BLOCK_ROWS at a time: as drawn, as text, and 0 and the position after each line."""
    model = planted_model(settings)
    for start in range(0, settings.rows, BLOCK_ROWS):
        drawn = model.draw("train", start // BLOCK_ROWS, min(BLOCK_ROWS, settings.rows - start))
        yield drawn, *_text(drawn, model.features, _SHAPES[settings.dataset].signed)


_HASH_DIGITS = 8
_WORD = 8  # bytes written at once: a hash, or an integer with the tab after it
_TAB, _NEWLINE = ord("\t"), ord("\n")


def _text(draw: Draw, features: Mapping[str, Feature], signed: str) -> tuple[bytes, NDArray[np.int64]]:
    """Return the lines of a block, and 0 and the position after each line.

    The whole block is assembled at once: it starts out as tabs, and column after column puts a word of 8 bytes at its
    place in every line. An integer's word is filled up with tabs, which only fall where tabs or later columns are to
    come; a missing hash puts its word into the slack behind the text.
    """
    integers = {name: _integer_words(name == signed) for name in CRITEO_DENSE}
    positions = {
        name: np.where(draw.missing[name], 0, draw.values[name] + 1) for name in CRITEO_DENSE
    }  # in the table of words, whose first is that of nothing
    hash_lengths = {name: _HASH_DIGITS * ~draw.missing[name] + 1 for name in CRITEO_CATEGORICAL}
    line_lengths = np.full(len(draw.label), 2, np.int64)
    for name in CRITEO_DENSE:
        line_lengths += integers[name][1][positions[name]]
    for lengths in hash_lengths.values():
        line_lengths += lengths
    ends = np.concatenate([[0], np.cumsum(line_lengths)])

    buffer = np.full(ends[-1] + _WORD, _TAB, np.uint8)
    # Every position of the buffer as the beginning of a word. The word type is opaque, as numpy stores words
    # of integers three times slower where they are not aligned.
    words = np.ndarray(len(buffer) - _WORD + 1, f"V{_WORD}", buffer=buffer.data, strides=(1,))
    at = ends[:-1].copy()
    buffer[at] = ord("0") + draw.label
    at += 2
    for name in CRITEO_DENSE:
        table, lengths = integers[name]
        words[at] = table[positions[name]]
        at += lengths[positions[name]]
    for name in CRITEO_CATEGORICAL:
        hashes = _hashes(draw.values[name], CRITEO_CATEGORICAL.index(name))
        places = np.where(draw.missing[name], ends[-1], at) if features[name].missing else at
        words[places] = _hexadecimal(hashes)
        at += hash_lengths[name]
    buffer[ends[1:] - 1] = _NEWLINE
    return buffer[: ends[-1]].tobytes(), ends


@cache
def _integer_words(signed: bool) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Return the texts of a missing value and of the counts 0, 1, ..., each padded with tabs to a word, and their
    lengths with one tab. In a signed column a count stands for the number below it, and 100 and 1,000, as rare ones,
    for -2 and -3."""
    largest = 65_535
    numbers = np.arange(largest + 1) - signed
    if signed:
        numbers[[100, 1_000]] = -2, -3
    texts = [b"\t", *(f"{number}\t".encode() for number in numbers.tolist())]
    words = np.frombuffer(b"".join(text.ljust(_WORD, b"\t") for text in texts), f"V{_WORD}")
    return words, np.array([len(text) for text in texts])


@cache
def _hexadecimal_pairs() -> NDArray[np.uint32]:
    """Return each 16-bit number's four digits, as the four bytes of an integer."""
    return np.frombuffer("".join(f"{number:04x}" for number in range(1 << 16)).encode(), np.uint32)


def _hexadecimal(hashes: NDArray[np.uint32]) -> NDArray[np.void]:
    """Return the 8 digits of each hash as a word."""
    # The high half comes first on any machine.
    return _hexadecimal_pairs()[hashes.astype(">u4").view(">u2")].view(f"V{_WORD}")


def _hashes(ids: NDArray[np.int32], column: int) -> NDArray[np.uint32]:
    """Return a 32-bit hash of each id, different for different ids: the finaliser of MurmurHash3, which is
    invertible."""
    mixed = ids.astype(np.uint32) ^ np.uint32((column + 1) * 0x9E3779B1 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed ^= mixed >> np.uint32(shift)
        mixed *= np.uint32(factor)
    return mixed ^ (mixed >> np.uint32(16))


def _check_outputs(settings: TsvSettings, outputs: Sequence[Path]) -> None:
    require(outputs, "no output file; give at least one")
    require(
        settings.rows >= len(outputs),
        f"{counted(settings.rows, 'row')} for {len(outputs)} files; give at least a row for each",
    )
    for path in outputs:
        require(not path.exists(), f"{path} exists; name a new file, or remove it if it is not needed")
        require(
            path.suffix not in _UNKNOWN_COMPRESSIONS,
            f"{path}: {path.suffix} is not written; name it .gz or .zst, or with neither for plain text",
        )
    require(len({path.resolve() for path in outputs}) >= len(outputs), "an output file is given twice; name each once")


@contextmanager
def whole_file(path: Path) -> Iterator[Callable[[bytes], Any]]:
    """Yield a function that writes text to a file, compressed by the file's suffix; the file gets its name when it is
    complete, and beside it a mark that ``preprocess`` notes in the report of the dataset.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as partial, partial.open("wb") as file:
            if path.suffix == ".gz":
                # Neither name nor time, so that equal text makes equal files.
                with gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as compressed:
                    yield compressed.write
            elif path.suffix == ".zst":
                with pa.output_stream(file, compression="zstd") as compressed:
                    yield compressed.write
            else:
                yield file.write
        mark_of(path).write_text(str(path.stat().st_size))
    except OSError as error:
        raise UserError(write_fault(path, error, "another --output")) from error

"""Contract: stack distances are those of an LRU list; a generated trace has its original's distances, hit rates and
number of distinct rows, phase by phase, stays within its table, and depends on the profile and the seed alone; what
cannot be profiled is refused by name."""

import hashlib
import inspect
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.folder import verify
from datamodules.generate import command, lru
from datamodules.generate.folder import rows_of_splits
from datamodules.generate.lru import LruStack
from datamodules.generate.profiles import CLASS_LOW, Profile, Profiler, TraceSource, phase_end, save_profiles
from datamodules.generate.trace import (
    BLOCK_ACCESSES,
    TraceGenerator,
    TraceSettings,
    generate_trace,
    measure_fit,
    render_fits,
    trace_schema,
)
from datamodules.writer import DatasetWriter
from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.plain_parser import HelpParser
from lightning_dlrm.contracts import terminal
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DatasetSchema

ACCESSES = 100_000


def zipf(rng: np.random.Generator) -> np.ndarray:
    return ((20_000 ** rng.random(ACCESSES)).astype(np.int32) * 7_919) % 20_011


def scan(rng: np.random.Generator) -> np.ndarray:
    """Round and round over 3,000 rows, in between to a hot one."""
    ids = (np.arange(ACCESSES) % 3_000 + 5).astype(np.int32)
    ids[rng.random(ACCESSES) < 0.3] = 4
    return ids


def moving(rng: np.random.Generator) -> np.ndarray:
    """A working set of 500 rows that is another one after every 10,000 accesses."""
    return (rng.integers(0, 500, ACCESSES) + np.arange(ACCESSES) // 10_000 * 500).astype(np.int32)


def tiny(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 3, ACCESSES).astype(np.int32)


def unique(_: np.random.Generator) -> np.ndarray:
    return np.arange(ACCESSES, dtype=np.int32)


TRACES: dict[str, tuple[int, Callable[[np.random.Generator], np.ndarray]]] = {
    "zipf": (20_011, zipf),
    "scan": (3_005, scan),
    "moving": (9_000, moving),
    "tiny": (3, tiny),
    "unique": (150_000, unique),
}


def plain_distances(ids: list[int]) -> list[int]:
    """With a list of rows, the latest first."""
    stack: list[int] = []
    distances = []
    for row in ids:
        distances.append(stack.index(row) + 1 if row in stack else 0)
        if row in stack:
            stack.remove(row)
        stack.insert(0, row)
    return distances


def make_profile(ids: np.ndarray, rows: int, column: str = "C1") -> Profile:
    profiler = Profiler(column, rows)
    for piece in np.array_split(ids, 7):
        profiler.add(piece)
    return profiler.profile()


def generated(profile: Profile, accesses: int, seed: int = 0) -> np.ndarray:
    trace = TraceGenerator(profile, seed)
    return np.concatenate([trace.next_block() for _ in range(-(-accesses // BLOCK_ACCESSES))])[:accesses]


@pytest.fixture(params=TRACES)
def case(request: pytest.FixtureRequest) -> tuple[np.ndarray, int]:
    rows, make = TRACES[request.param]
    return make(np.random.default_rng(5)), rows


@pytest.mark.parametrize("slots", [512, 1 << 16])
def test_distances_are_those_of_an_lru_list(
    case: tuple[np.ndarray, int], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lru, "_LEAST_SLOTS", slots)
    ids = case[0][:5_000]
    stack = LruStack(case[1])
    found = np.concatenate([stack.distances(ids[a:b]) for a, b in itertools.pairwise([0, 1, 700, 700, 5_000])])
    assert found.tolist() == plain_distances(ids.tolist())
    assert stack.depth == len(np.unique(ids))


def test_accesses_at_given_distances_have_them(case: tuple[np.ndarray, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lru, "_LEAST_SLOTS", 512)
    wanted = plain_distances(case[0][:5_000].tolist())
    stack = LruStack()
    made = np.concatenate([stack.accesses(piece) for piece in np.array_split(np.array(wanted, dtype=np.int32), 3)])
    assert plain_distances(made.tolist()) == wanted
    firsts = made[np.array(wanted) == 0]
    assert firsts.tolist() == list(range(len(firsts)))


def test_a_distance_beyond_the_depth_is_the_depth() -> None:
    distances = np.array([5, 0, 9, 1, 2**31 - 1], dtype=np.int32)
    assert LruStack().accesses(distances).tolist() == [0, 1, 0, 0, 1]


def test_selection_chooses_just_so_many_with_equal_chances() -> None:
    rng = np.random.default_rng(3)
    times = np.zeros(20)
    for _ in range(4_000):
        bits = rng.integers(0, 2**32, 20, dtype=np.uint64)
        first = LruStack.choose(bits[:8], 20, 6)
        chosen = np.concatenate([first, LruStack.choose(bits[8:], 12, 6 - int(first.sum()))])
        assert chosen.sum() == 6
        times += chosen
    assert np.abs(times - 1_200).max() < 5 * np.sqrt(4_000 * 0.3 * 0.7)


def test_a_profile_counts_distances_phase_by_phase() -> None:
    ids = zipf(np.random.default_rng(1))[:3_000]
    profile = make_profile(ids, 20_011)
    distances, start = np.array(plain_distances(ids.tolist())), 0
    for phase, counts in enumerate(profile.counts):
        end = min(phase_end(phase), 3_000)
        expected = [np.count_nonzero((a <= distances[start:end]) & (distances[start:end] < b)) for a, b in
                    itertools.pairwise([*CLASS_LOW.tolist(), 2**31])]  # fmt: skip
        assert counts.tolist() == expected
        assert profile.beginning(end).tolist() == np.cumsum(profile.counts, axis=0)[phase].tolist()
        start = end
    assert start == 3_000 == profile.accesses and profile.distinct == len(np.unique(ids))
    ends = [phase_end(phase) for phase in range(60)]
    assert ends[::4] == [64 << octave for octave in range(15)]
    assert all(1.15 < b / a < 1.23 for a, b in itertools.pairwise(ends))


def test_a_generated_trace_has_the_originals_profile(case: tuple[np.ndarray, int]) -> None:
    """Distances are drawn: their distribution differs by about 1 / sqrt(accesses) = 0.003, here at most by twice
    that. Distinct rows are as many at the end of every phase; ids are within the table."""
    ids, rows = case
    original = make_profile(ids, rows)
    trace = generated(original, ACCESSES, seed=3)
    assert trace.dtype == np.int32 and trace.min() >= 0 and trace.max() < rows
    copy = make_profile(trace, rows)
    assert copy.counts[:, 0].tolist() == original.counts[:, 0].tolist()
    figures = measure_fit(original, copy)
    assert figures.distance_error < 0.006 and figures.variation < 0.012
    assert figures.distinct == (original.distinct,) * 2
    # The figures themselves, by plain counting on either trace.
    plain = [LruStack(rows).distances(part) for part in (ids, trace)]
    for size, *rates in figures.caches:
        hits = [np.mean((distances > 0) & (distances <= size)) for distances in plain]
        assert rates == pytest.approx(hits, abs=1e-12) and abs(hits[0] - hits[1]) < 0.006
    assert len(figures.caches) >= (1 if rows == 3 else 3)


def test_a_longer_trace_goes_on_and_stays_within_its_table() -> None:
    ids, rows = zipf(np.random.default_rng(5)), 20_011
    original = make_profile(ids, rows)
    assert original.distinct < 0.95 * rows
    trace = generated(original, 5 * ACCESSES)
    assert np.array_equal(trace[:ACCESSES], generated(original, ACCESSES))
    grown = [len(np.unique(trace[: factor * ACCESSES])) for factor in (1, 2, 4)]
    expected = [min(rows, original.distinct * factor**original.growth) for factor in (1, 2, 4)]
    assert grown == pytest.approx(expected, rel=0.01) and trace.max() < rows
    # Once the whole table is seen, there are no new rows; in the original's last octave there were some.
    few = Profile("C1", original.distinct, original.counts)
    assert generated(few, 3 * ACCESSES).max() == original.distinct - 1
    # The last octave's distances: of those that are no first accesses.
    last = LruStack(rows).distances(trace)[4 * ACCESSES :]
    before = LruStack(rows).distances(ids)[ACCESSES // 2 :]
    for size in (10, 100, 1_000):
        shares = [np.mean(part[part > 0] <= size) for part in (before, last)]
        assert abs(shares[0] - shares[1]) < 0.015


def test_a_column_that_never_repeats_goes_round_when_its_table_is_used_up() -> None:
    profile = make_profile(np.arange(2_000, dtype=np.int32), 3_000)
    assert profile.growth == pytest.approx(1)
    trace = generated(profile, 9_000)
    # The table is used up in the phase from 90 / 64 to 107 / 64 of the original's length, its last rows at random
    # places between returns to the row that was not seen for longest.
    assert trace[:2_812].tolist() == list(range(2_812)) and trace.max() == 2_999
    round_trip = trace[3_343 : 3_343 + 3_000]
    assert sorted(round_trip.tolist()) == list(range(3_000))
    assert np.array_equal(trace[3_343 + 3_000 :], round_trip[: 9_000 - 6_343])


def test_traces_are_the_same_in_every_process() -> None:
    """The digest is the first release's: another means other data under the same profile and seed."""
    # Importing this file would take longer than the trace.
    program = (
        "import hashlib; import numpy as np; from datamodules.generate.profiles import Profile, Profiler\n"
        "from datamodules.generate.trace import BLOCK_ACCESSES, TraceGenerator\n"
        + "\n".join(inspect.getsource(function) for function in (make_profile, generated, zipf_by_hand))
        + "profile = make_profile(zipf_by_hand(), 2_000)\n"
        "print(hashlib.sha256(generated(profile, 200_000, seed=9).tobytes()).hexdigest()[:16])"
    )
    other = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    profile = make_profile(zipf_by_hand(), 2_000)
    here = hashlib.sha256(generated(profile, 200_000, seed=9).tobytes()).hexdigest()[:16]
    assert [other.stdout.strip(), here] == ["b97e48c081d4b2db"] * 2
    assert not np.array_equal(generated(profile, 1_000, seed=9), generated(profile, 1_000, seed=10))


def zipf_by_hand() -> np.ndarray:
    """A skewed trace without a library's random numbers."""
    x = np.arange(1, 30_001, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    return ((x >> np.uint64(40)) * (x >> np.uint64(52)) % np.uint64(1 << 24) >> np.uint64(13)).astype(np.int32) % 2_000


# --- from and to dataset folders -------------------------------------------------------------------------

COLUMNS = (
    Column(name="label", role="label"),
    Column(name="C1", role="categorical", cardinality=20_011),
    Column(name="M1", role="multi_hot", cardinality=50),
    Column(name="C2", role="categorical", cardinality=3),
)
ROWS = 20_000


def write_dataset(folder: Path, rows: int = ROWS, columns: tuple[Column, ...] = COLUMNS) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    lengths = rng.integers(0, 4, rows)
    arrays = {
        "label": np.zeros(rows, np.int8),
        "C1": zipf(rng)[:rows],
        "M1": (rng.integers(0, 50, lengths.sum()).astype(np.int32), np.append(0, np.cumsum(lengths))),
        "C2": tiny(rng)[:rows],
    }
    with DatasetWriter(folder, columns) as writer:
        writer.write("train", {column.name: arrays[column.name] for column in columns})
        writer.finish(dataset="mine", protocol="own")
    return arrays


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("source") / "data"
    return folder, write_dataset(folder)


def test_columns_of_a_folder_are_profiled_bags_id_by_id(source: tuple[Path, dict[str, Any]]) -> None:
    folder, arrays = source
    profiles = TraceSource(folder).profiles(progress=False)
    assert [(profile.column, profile.rows) for profile in profiles] == [("C1", 20_011), ("M1", 50), ("C2", 3)]
    for profile, ids in zip(profiles, (arrays["C1"], arrays["M1"][0], arrays["C2"]), strict=True):
        assert np.array_equal(profile.counts, make_profile(ids, profile.rows).counts)
    assert [p.column for p in TraceSource(folder, ["C2", "C1"]).profiles(progress=False)] == ["C2", "C1"]


def test_saved_profiles_give_the_same_rows(source: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = source[0]
    profiles = TraceSource(folder).profiles(progress=False)
    save_profiles(profiles, tmp_path / "p.json")
    again = TraceSource(tmp_path / "p.json").profiles()
    for first, second in zip(profiles, again, strict=True):
        assert (first.column, first.rows) == (second.column, second.rows)
        assert np.array_equal(first.counts, second.counts)
    settings = TraceSettings(train_rows=3_000, validation_rows=20, test_rows=0, dense=1)
    sums = [
        [
            file.sha256
            for split in generate_trace(TraceSource(path), settings, tmp_path / name, progress=False).splits.values()
            for file in split.files
        ]
        for path, name in ((folder, "a"), (tmp_path / "p.json", "b"))
    ]
    assert sums[0] == sums[1]


def test_splits_follow_each_other_in_one_trace(source: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    chosen = TraceSource(source[0], ["C1", "M1"])
    settings = TraceSettings(train_rows=BLOCK_ACCESSES + 10, validation_rows=BLOCK_ACCESSES - 5, test_rows=7, dense=2)
    schema = generate_trace(chosen, settings, tmp_path / "data", progress=False)
    verify(tmp_path / "data", schema)
    planned = trace_schema(chosen, settings)
    assert planned.columns == schema.columns and planned.encoding_fingerprint == schema.encoding_fingerprint
    assert schema.features.tables == {"C1": 20_011, "M1": 50} and schema.features.dense == 2
    tables = [pq.read_table(tmp_path / "data" / split) for split in ("train", "validation", "test")]
    assert [len(table) for table in tables] == list(rows_of_splits(settings).values())
    rows = pa.concat_tables(tables)
    for number, profile in enumerate(chosen.profiles(progress=False)):
        trace = TraceGenerator(profile, 0, number)
        ids = np.concatenate([trace.next_block() for _ in range(3)])[: len(rows)]
        assert np.array_equal(rows[profile.column].to_numpy(), ids)
    assert 0.24 < rows["label"].to_numpy().mean() < 0.26 and abs(rows["I2"].to_numpy().mean()) < 0.02
    # A shorter dataset is the beginning of a longer one.
    short = TraceSettings(train_rows=1_000, validation_rows=0, test_rows=0, dense=2)
    generate_trace(chosen, short, tmp_path / "short", progress=False)
    assert pq.read_table(tmp_path / "short/train").equals(rows.slice(0, 1_000))


def test_command_reports_the_fit(
    source: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parser = HelpParser()
    command.add_arguments(parser)

    def run(*arguments: str) -> str:
        assert command.run(parser.parse_args(["trace", *arguments])) == 0
        return capsys.readouterr().out

    data, profile, plot = str(tmp_path / "data"), str(tmp_path / "p.json"), tmp_path / "fit.png"
    text = run("--from", str(source[0]), "--column", "C1", "--output", data, "--profile", profile, "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    schema = DatasetSchema.load(Path(data))
    assert schema.splits["train"].rows == ROWS and list(schema.features.tables) == ["C1"]
    original, copy = (TraceSource(Path(path), ["C1"]).profiles(progress=False)[0] for path in (source[0], data))
    assert render_fits([measure_fit(original, copy)]) in text
    assert "percentage points" in text
    words = " ".join(text.split())
    assert (
        "independent of the features (best AUC 0.5): use these data for speed, not scores:" in words
        and "train on it" not in words
    )
    text = run("--profile", profile, "--output", str(tmp_path / "long"), "--rows", "25000", "--test-rows", "0")
    assert f"C1: the first {ROWS:,} of 25,000 generated accesses; original / generated" in text
    rows = np.concatenate(
        [pq.read_table(file)["C1"].to_numpy() for file in sorted((tmp_path / "long").rglob("train/*"))]
    )
    written, beginning = len(np.unique(rows[:ROWS])), make_profile(rows[:ROWS], original.rows)
    assert f" / {written:,}\n" in text and render_fits([measure_fit(original, beginning)]).split("\n", 1)[1] in text
    assert f"after the original's {ROWS:,} accesses, the unique rows grow" in text and "after 25,000 acc" in text
    monkeypatch.setattr(terminal, "line_width", lambda stream: 79)
    text = run("--profile", profile, "--output", str(tmp_path / "wrapped"), "--rows", "25000", "--test-rows", "0")
    assert all(len(line) < 80 or str(tmp_path) in line for line in text.splitlines())
    assert "the unique rows grow" in " ".join(text.split())
    text = run("--profile", profile, "--output", str(tmp_path / "short"), "--rows", "5000", "--test-rows", "0")
    assert f"C1: the first 5,000 of {ROWS:,} original accesses; original / generated" in text
    with pytest.raises(UserError, match=r"p\.json exists; name a new file, or leave --from out"):
        run("--from", str(source[0]), "--profile", profile)
    with pytest.raises(UserError, match="no source is given; give --from DIR, or --profile FILE"):
        run("--output", data)
    with pytest.raises(UserError, match="no output is given; give --output DIR"):
        run("--from", str(source[0]))
    new = ["--from", str(source[0]), "--output", str(tmp_path / "new")]
    for arguments, message in (
        ([*new[:3], data], "exists and is not an empty folder"),
        ([*new, "--rows", "999"], "--rows is 999; give at least 1,000, to measure the fit"),
        ([*new, "--plot", "fit.gif"], "fit.gif does not have the suffix of a figure; give it one of .png, .svg, .pdf"),
        ([*new, "--plot", "nowhere/fit.png"], "cannot write nowhere/fit.png: there is no folder nowhere"),
        ([*new, "--profile", "nowhere/p.json"], "cannot write nowhere/p.json: there is no folder nowhere"),
        (["--profile", "nowhere.json", *new[2:]], "there is no file nowhere.json; give --profile a file of trace prof"),
        ([*new[:2], "--plot", "fit.png", "--profile", "q.json"], "--plot compares generated accesses"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments)
    assert not (tmp_path / "new").exists()


def test_addresses_are_profiled_like_folders(source: tuple[Path, dict[str, Any]]) -> None:
    fsspec.filesystem("memory").put(str(source[0]), "/traced", recursive=True)
    local, remote = (TraceSource(place, ["C1"]) for place in (source[0], "memory://traced"))
    assert local.identity == remote.identity
    (expected,), (found,) = (chosen.profiles(progress=False) for chosen in (local, remote))
    assert expected.as_json() == found.as_json()
    with pytest.raises(UserError, match="no dataset folder at memory://nothing"):
        TraceSource("memory://nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["C9"]}, "has no categorical or multi-hot column C9; it has C1, M1, C2"),
        ({"columns": ["label"]}, "has no categorical or multi-hot column label"),
        ({"split": "test"}, "has no rows in its test split; it has train"),
    ],
)
def test_what_a_folder_lacks_is_named(source: tuple[Path, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TraceSource(source[0], **options)


def test_too_few_accesses_and_no_tables_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "few", 999)
    with pytest.raises(UserError, match=r"column C1 of .* has 999 accesses in its train split; a profile needs at"):
        TraceSource(tmp_path / "few", ["C1"]).profiles(progress=False)
    write_dataset(tmp_path / "none", 2_000, COLUMNS[:1])
    with pytest.raises(UserError, match="has no categorical or multi-hot columns"):
        TraceSource(tmp_path / "none")
    with pytest.raises(UserError, match=r".*nowhere does not exist; give a dataset folder"):
        TraceSource(tmp_path / "nowhere")


@pytest.mark.parametrize("wrong", [-1, 50])
def test_ids_beyond_their_table_are_refused(wrong: int) -> None:
    profiler = Profiler("C1", 50)
    with pytest.raises(UserError, match=r"column C1 has ids from .* its table has rows 0 to 49"):
        profiler.add(np.array([3, wrong, 4], dtype=np.int32))


def damaged(change: Callable[[dict[str, Any]], Any]) -> str:
    document = {
        "trace_profiles": 1,
        "columns": [make_profile(zipf(np.random.default_rng(0))[:2_000], 20_011).as_json()],
    }
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        damaged(lambda d: d.update(trace_profiles=2)),
        damaged(lambda d: d["columns"][0].pop("phases")),
        damaged(lambda d: d["columns"][0].update(table_rows=5)),
        damaged(lambda d: d["columns"][0]["phases"].pop(0)),
        damaged(lambda d: d["columns"][0]["phases"][3]["counts"].__setitem__(0, -1)),
        damaged(lambda d: d["columns"][0]["phases"][3]["counts"].__setitem__(0, 10**6)),
        damaged(lambda d: d["columns"][0]["phases"][3]["distances_from"].__setitem__(1, 65)),
        damaged(lambda d: d["columns"][0]["phases"][3]["distances_from"].__setitem__(1, 2**40)),
    ],
)
def test_files_that_hold_no_profiles_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match=r"p\.json is not a file of trace profiles: .* make one with") as error:
        TraceSource(tmp_path / "p.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_rows": -1}, "train_rows is -1; give 0 or more"),
        ({"train_rows": 0, "validation_rows": 0, "test_rows": 0}, "no split has rows"),
        ({"dense": -2}, "dense is -2"),
        ({"click_rate": 0.0}, "click_rate is 0.0"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TraceSettings(**{"train_rows": 10, **changes})


def test_without_numba_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "datamodules.generate.lru")
    with pytest.raises(UserError, match=r"traces need numba, .* pip install 'lightning-dlrm\[trace\]'"):
        Profiler("C1", 5)


def test_without_a_folder_for_its_cache_numba_compiles_in_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def without_folder(*, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function '_ones': no locator available for file 'lru.py'")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", without_folder)
    assert lru._jit(lambda number: number + 1)(2) == 3


def test_the_benchmark_times_both_directions(tmp_path: Path) -> None:
    options = ["--table-rows", "500", "--accesses", "65536", "--rounds", "1", "--json", str(tmp_path / "rows.json")]
    assert main(["bench", "trace", *options]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 8 and {row["implementation"] for row in rows} == {"ours", "baseline"}
    assert all(row["samples_per_s"] > 0 and row["work"] == "trace" for row in rows)
    assert main(["bench", "trace", "--accesses", "5"]) == 2

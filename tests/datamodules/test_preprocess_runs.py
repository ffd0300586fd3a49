"""Contract: however a preprocessing run is made or broken off, the same bytes come out, and nothing done is lost.

Workers are real processes, kills are real (SIGKILL of the whole process group), the cluster is a real
Dask cluster of two worker processes.
"""

import argparse
import errno
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest

from datamodules.preprocess import command, counting, criteo_reader, encoding, pipeline, staging
from datamodules.preprocess.journal import find_records, written_aside
from datamodules.preprocess.pipeline import Target, preprocess
from datamodules.preprocess.progress import Progress, Stage
from datamodules.preprocess.workers import Workers, usable_cores
from lightning_dlrm.__main__ import _user_error_in, main
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import DatasetSchema
from tests.raw_criteo import Plain, assert_equals_plain, folder_bytes, generated_lines, schema_of_some, written

QUIET = Progress(show=False)
BLOCK_BYTES = 26_000
SCHEMA = schema_of_some(
    "quantile",
    ["I1", "I2", "B1", "B2", *(f"C{i}" for i in range(1, 8))],
    dataset="terabyte",
    split={"by": "days", "days": "files", "negative_sampling_rate": 0.5},
)
"""Every stage, with few columns."""


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three days, plain and compressed, of 400 rows each."""
    folder = tmp_path_factory.mktemp("days")
    return [written(folder / f"day_{day}{s}", generated_lines(400, day)) for day, s in enumerate(("", ".gz", ""))]


@pytest.fixture(scope="module")
def undisturbed(days: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What comes out of them in one process."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    make(days, folder)
    return folder_bytes(folder)


def make(days: list[Path], output: Path, **options: Any) -> DatasetSchema:
    given = {"progress": QUIET, "block_bytes": BLOCK_BYTES, "workers": 1, "schema": SCHEMA, **options}
    return preprocess(None, None, days, output, **given)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_dask_cluster(tmp_path: Path, days: list[Path], undisturbed: dict[str, bytes]) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        # Another size of pieces, which changes no byte: few tasks.
        make(days, tmp_path / "out", workers=None, scheduler=cluster.scheduler_address, block_bytes=1_000_000)
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_no_scheduler(tmp_path: Path, days: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.preprocess.workers._CONNECT_TIMEOUT_S", 1)
    with pytest.raises(UserError, match=r"no Dask scheduler at tcp://127.0.0.1:9 .*dask scheduler"):
        make(days, tmp_path / "out", workers=None, scheduler="tcp://127.0.0.1:9")
    assert names_in(tmp_path) == set()


def killed_and_resumed(tmp_path: Path, days: list[Path], moments: list[int]) -> None:
    """Kill a run of two processes when it has finished so many steps, each time anew, then go on in one process."""
    options = {"block_bytes": BLOCK_BYTES, "negative_sampling_rate": 0.5}
    code = (
        "import sys; from datamodules.preprocess.pipeline import preprocess\n"
        "from datamodules.preprocess.progress import Progress\n"
        "made = ('terabyte', 'quantile', sys.argv[2:], sys.argv[1])\n"
        f"preprocess(*made, progress=Progress(show=False), workers=2, **{options})"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out"), *map(str, days)]
    rng = random.Random(0)

    killed = 0
    for finished in moments:
        run = subprocess.Popen(words, cwd=Path(__file__).parents[2], start_new_session=True)
        while len(find_records(tmp_path / ".out.preprocess")) < finished and run.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        if run.wait() == 0:  # it ended between two looks, on a busy machine
            break
        assert run.returncode == -signal.SIGKILL
        killed += 1
    assert killed
    for name in ("out", "undisturbed"):
        preprocess("terabyte", "quantile", days, tmp_path / name, progress=QUIET, workers=1, **options)  # type: ignore[arg-type]
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "undisturbed")
    assert names_in(tmp_path) == {"out", "undisturbed"}


def test_killed_and_resumed(tmp_path: Path, days: list[Path]) -> None:
    """Amid the segments, of which there are 12, and amid the columns, of which there are 39."""
    killed_and_resumed(tmp_path, days, [5, 35])


@pytest.mark.slow
def test_killed_at_twenty_moments_and_resumed(tmp_path: Path, days: list[Path]) -> None:
    killed_and_resumed(tmp_path, days, sorted(random.Random(2).sample(range(43), 20)))


class Interrupted(Progress):
    """Fails at the end of a stage."""

    def __init__(self, at: str, how: Callable[[], None]):
        super().__init__(show=False)
        self.at, self.how, self.notes = at, how, []  # type: ignore[var-annotated]

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def stage(self, name: str, *args: Any, **options: Any) -> Iterator[Stage]:
        with super().stage(name, *args, **options) as running:
            yield running
            if name == self.at:
                self.how()


def fail() -> None:
    raise RuntimeError("interrupted")


@pytest.fixture
def interrupted(tmp_path: Path, days: list[Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Runs up to the end of a stage, and leaves what is finished."""
    monkeypatch.setattr(pipeline, "_SMALL_BYTES", 0)

    def run(stage: str) -> None:
        with pytest.raises(RuntimeError, match="interrupted"):
            make(days, tmp_path / "out", progress=Interrupted(stage, fail))
        assert names_in(tmp_path) == {".out.preprocess"}

    return run


def test_nothing_done_is_done_again(
    tmp_path: Path,
    days: list[Path],
    undisturbed: dict[str, bytes],
    interrupted: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finished = {
        "stage": (criteo_reader, "parse"),
        "count": (counting, "_spread_values"),
        "encode": (encoding, "_encoded"),
    }
    for stage, (module, name) in finished.items():
        interrupted(stage)
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("was finished before"))
    make(days, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == undisturbed
    assert names_in(tmp_path) == {"out"}


def test_damaged_files_are_made_again(
    tmp_path: Path, days: list[Path], undisturbed: dict[str, bytes], interrupted: Callable[[str], None]
) -> None:
    interrupted("encode")
    for kind in ("*.arrow", "*.ids", "part-*.parquet", "C3.parquet"):
        path = sorted((tmp_path / ".out.preprocess").rglob(kind))[0]
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    progress = Interrupted("", fail)
    make(days, tmp_path / "out", progress=progress)
    assert any("damaged steps, which are repeated: 4" in note for note in progress.notes)
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_staged_rows_serve_another_protocol(
    tmp_path: Path, days: list[Path], interrupted: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted("count")
    monkeypatch.setattr(criteo_reader, "parse", lambda *_: pytest.fail("was staged before"))
    preprocess("terabyte", "nvidia", days, tmp_path / "out", None, QUIET, BLOCK_BYTES, workers=1)
    files = [generated_lines(400, day) for day in range(3)]
    assert_equals_plain(tmp_path / "out", Plain("nvidia", files, "terabyte"))


def test_changed_file_is_parsed_again_and_others_are_not(
    tmp_path: Path, days: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_SMALL_BYTES", 0)
    lines = [generated_lines(60, day) for day in range(2)]
    good = lines[1][40]
    lines[1][40] = ["bad"]
    paths = [written(tmp_path / f"day_{day}", lines[day]) for day in range(2)]
    with pytest.raises(UserError, match="day_1, line 41"):
        preprocess("terabyte", "dlrm", paths, tmp_path / "out", None, QUIET, workers=1)
    lines[1][40] = good
    written(paths[1], lines[1])
    parsed = []
    parse = criteo_reader.parse
    monkeypatch.setattr(
        criteo_reader, "parse", lambda text, labelled: parsed.append(len(text)) or parse(text, labelled)
    )
    preprocess("terabyte", "dlrm", paths, tmp_path / "out", None, QUIET, workers=1)
    assert parsed == [paths[1].stat().st_size]
    assert_equals_plain(tmp_path / "out", Plain("dlrm", lines, "terabyte"))


def test_the_same_process_makes_another_order_of_the_same_files(tmp_path: Path) -> None:
    files = [generated_lines(60, day) for day in range(2)]
    paths = [written(tmp_path / f"day_{day}", lines) for day, lines in enumerate(files)]
    for turn in (1, -1):
        preprocess("terabyte", "dlrm", paths[::turn], tmp_path / "out", None, QUIET, workers=1)
        assert_equals_plain(tmp_path / "out", Plain("dlrm", files[::turn], "terabyte"))
        shutil.rmtree(tmp_path / "out")


def test_broken_off_at_the_very_end(
    tmp_path: Path, days: list[Path], undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process was writing does not get into the dataset; what is whole is not told as damaged."""
    monkeypatch.setattr(pipeline, "_SMALL_BYTES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Target, "deliver", lambda *_: fail())
        with pytest.raises(RuntimeError, match="interrupted"):
            make(days, tmp_path / "out")
    (result,) = (tmp_path / ".out.preprocess").glob("encode/*/result")
    with written_aside(result / "killed") as partial:
        partial.touch()
    (result / "killed").rename(partial)
    progress = Interrupted("", fail)
    make(days, tmp_path / "out", progress=progress)
    assert any("steps of an earlier run are finished" in note for note in progress.notes)
    assert not any("damaged" in note for note in progress.notes)
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_output_that_cannot_be_written_is_told_before(tmp_path: Path, days: list[Path]) -> None:
    (tmp_path / "file").touch()
    progress = Progress(show=False)
    with pytest.raises(UserError, match=r"cannot write to .*/file; choose another --output"):
        make(days, tmp_path / "file/out", work=tmp_path, progress=progress)
    assert progress.stages == [] and names_in(tmp_path) == {"file"}


def test_failed_upload_is_told_and_the_next_run_goes_on(
    tmp_path: Path, days: list[Path], undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_SMALL_BYTES", 0)
    output: Any = (tmp_path / "out").as_uri()

    def refuse(*_: Any) -> None:
        raise PermissionError("no\naccess")

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("file")), "put_file", refuse)
        with pytest.raises(
            UserError, match=r"out cannot be reached \(PermissionError: no access\).*The same command resumes"
        ):
            make(days, output, work=tmp_path)
    make(days, output, work=tmp_path)
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_working_folder_of_a_run_killed_after_delivery_is_removed(tmp_path: Path) -> None:
    raw = written(tmp_path / "train.txt", generated_lines(50))
    preprocess("kaggle", "dlrm", [raw], tmp_path / "out", None, QUIET)
    (tmp_path / ".out.preprocess/stage").mkdir(parents=True)
    preprocess("kaggle", "dlrm", [raw], tmp_path / "out", None, QUIET)
    assert names_in(tmp_path) == {"train.txt", "out"}


def test_finished_dataset_is_left_alone_or_refused(tmp_path: Path) -> None:
    raw = written(tmp_path / "train.txt", generated_lines(50))
    out = tmp_path / "out"
    first = preprocess("kaggle", "dlrm", [raw], out, None, QUIET)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    progress = Progress(show=False)
    assert preprocess("kaggle", "dlrm", [raw], out, None, progress) == first
    assert progress.stages == [] and {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    for message, call in (
        ("protocol was dlrm, now it is modern", lambda: preprocess("kaggle", "modern", [raw], out)),
        ("max_rows was not given, now it is 9", lambda: preprocess("kaggle", "dlrm", [raw], out, 9)),
        ("min_count was 1, now it is 3", lambda: preprocess("kaggle", "dlrm", [raw], out, min_count=3)),
    ):
        with pytest.raises(UserError, match=message):
            call()
    other = written(tmp_path / "other.txt", generated_lines(50))
    with pytest.raises(UserError, match=r"the input was train.txt, now it is other.txt"):
        preprocess("kaggle", "dlrm", [other], out)
    written(raw, generated_lines(51))
    with pytest.raises(UserError, match=r"train.txt had .* bytes, now it has"):
        preprocess("kaggle", "dlrm", [raw], out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_second_run_into_one_folder_is_refused(tmp_path: Path, days: list[Path]) -> None:
    def meddle() -> None:
        with pytest.raises(UserError, match="another run is making"):
            make(days, tmp_path / "out")

    make(days, tmp_path / "out", progress=Interrupted("stage", meddle))
    assert names_in(tmp_path) == {"out"}


def test_full_disk_is_told_and_the_next_run_goes_on(
    tmp_path: Path,
    days: list[Path],
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In each stage: the next run gets on to the next stage."""
    monkeypatch.setattr(pipeline, "_SMALL_BYTES", 0)
    places: list[tuple[Any, str]] = [(staging, "segment_of"), (counting, "_assign"), (encoding, "_encoded")]
    for module, at in places:
        calls = 0
        whole = getattr(module, at)

        def full(*args: Any, whole: Callable[..., Any] = whole) -> Any:
            nonlocal calls
            calls += 1
            if calls == 7:
                raise OSError(errno.ENOSPC, "No space left on device")
            return whole(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, at, full)
            with pytest.raises(UserError, match=r"disk is full .*make room\. The same command resumes") as error:
                make(days, tmp_path / "out")
            assert "\n" not in str(error.value) and calls == 7
        assert names_in(tmp_path) == {".out.preprocess"}
    make(days, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_unforeseen_error_of_a_worker_ends_the_run() -> None:
    class Unforeseen(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(KeyError("unforeseen"))
            return future

    pool = Workers(executor=Unforeseen(), count=1, resume_hint="")
    with pytest.raises(KeyError, match="unforeseen") as error:
        list(pool.map(print, ["job"]))
    assert error.value.__cause__ is None
    error.value.__cause__ = error.value
    assert _user_error_in(error.value) is None


def test_file_larger_than_allowed_is_told(tmp_path: Path, days: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(*args: Any) -> Any:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(staging, "segment_of", limited)
    with pytest.raises(UserError, match=r"File too large.*make room"):
        make(days, tmp_path / "out")


def test_dead_worker_is_told_and_the_next_run_goes_on(tmp_path: Path) -> None:
    raw = tmp_path / "train.txt"
    text = "".join("\t".join(line) + "\n" for line in generated_lines(1000))
    raw.write_text(text * 60)  # 12 MB: worth keeping what is done of it
    words = ["preprocess", "--dataset", "kaggle", "--protocol", "dlrm", "--input", raw, "--workers", "2"]
    command_line = [sys.executable, "-m", "lightning_dlrm", *map(str, words), "--output"]
    place = {"cwd": Path(__file__).parents[2], "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen([*command_line, str(tmp_path / "out")], **place)  # type: ignore[call-overload]
    while run.poll() is None:
        if workers := psutil.Process(run.pid).children():
            workers[0].kill()
            break
        time.sleep(0.01)
    _, errors = run.communicate()
    assert run.returncode == 2
    last = errors.splitlines()[-1]
    assert last.startswith("error: a worker process died") and "The same command resumes" in last
    assert "Traceback" not in errors
    assert subprocess.run([*command_line, str(tmp_path / "out")], check=False, **place).returncode == 0  # type: ignore[call-overload]
    preprocess("kaggle", "dlrm", [raw], tmp_path / "again", progress=QUIET, workers=1)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "again")


@pytest.mark.parametrize("stage", ["", "stage", "count", "encode"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_a_small_run_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, stage: str
) -> None:
    progress = Interrupted(stage, lambda: os.kill(os.getpid(), number))
    monkeypatch.setattr(command, "Progress", lambda: progress)
    if not stage:  # before the working folder is made
        monkeypatch.setattr(pipeline, "find_files", lambda *_, **__: os.kill(os.getpid(), number))
    raw = written(tmp_path / "train.txt", generated_lines(100))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = ["--dataset", "kaggle", "--protocol", "dlrm", "--input", str(raw), "--output", str(tmp_path / "out")]
    with pytest.raises((SystemExit, KeyboardInterrupt)) as left:
        command.run(parser.parse_args(words))
    assert left.type is KeyboardInterrupt if number == signal.SIGINT else left.value.args == (143,)
    assert names_in(tmp_path) == {"train.txt"}
    kept = "interrupted. Nothing is kept: the same command starts from the beginning"
    assert progress.notes[-1] == (
        kept if stage else "interrupted; nothing was written: run the same command to start again"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_a_command_begins_is_told(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, command.__name__)
    monkeypatch.setattr(importlib, "import_module", lambda _: os.kill(os.getpid(), number))
    if number == signal.SIGINT:
        assert main(["preprocess"]) == 130
    else:
        with pytest.raises(SystemExit, match="143"):
            main(["preprocess"])
    assert capsys.readouterr().err == "interrupted while the command was starting; nothing was written\n"


def test_addresses_in_memory(
    tmp_path: Path, days: list[Path], undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    memory = fsspec.filesystem("memory")
    for day in days:
        memory.pipe(f"/raw/{day.name}", day.read_bytes())
    addresses: list[Any] = [f"memory://raw/{day.name}" for day in days]
    first = make(addresses, "memory://made/out")  # type: ignore[arg-type]
    made = {
        path.removeprefix("/made/out/"): memory.cat(path)
        for path in memory.find("/made/out")
        if not path.endswith("report.json")
    }
    assert made == undisturbed
    assert names_in(tmp_path) == set()
    progress = Progress(show=False)
    assert make(addresses, "memory://made/out", progress=progress) == first  # type: ignore[arg-type]
    assert progress.stages == []
    with pytest.raises(UserError, match="on_bad_row was fail, now it is skip"):
        make(addresses, "memory://made/out", on_bad_row="skip")  # type: ignore[arg-type]
    memory.pipe("/full/file", b"")
    with pytest.raises(UserError, match="memory://full exists and is not an empty folder"):
        make(addresses, "memory://full")  # type: ignore[arg-type]
    elsewhere: list[dict[str, Any]] = [{"workers": 2}, {"workers": None, "scheduler": "tcp://x:1"}]
    for options in elsewhere:
        with pytest.raises(UserError, match=r"memory://raw/\w+ is in the memory of this process.* leave out --w"):
            make(addresses, tmp_path / "out", **options)
    with pytest.raises(UserError, match="memory://raw/none does not exist"):
        make(["memory://raw/none"], tmp_path / "out")  # type: ignore[list-item]


class WholeFiles(SimpleHTTPRequestHandler):
    """A server that sends the whole file for any part of it."""

    def log_message(self, *_: Any) -> None:
        pass


class NoSizes(WholeFiles):
    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Content-Length":
            super().send_header(keyword, value)


@pytest.mark.parametrize(
    ("handler", "message"),
    [(WholeFiles, "does not send parts of files: copy the files"), (NoSizes, "does not report the size of the file")],
)
def test_servers_that_cannot_send_parts_of_files(
    tmp_path: Path, days: list[Path], handler: type[WholeFiles], message: str
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=days[0].parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address: Any = f"http://127.0.0.1:{server.server_port}/{days[0].name}"
            with pytest.raises(UserError, match=message):
                make([address], tmp_path / "out")
        finally:
            server.shutdown()


def test_a_job_with_few_cores_and_a_long_temporary_folder_whose_messages_nobody_reads(tmp_path: Path) -> None:
    raw = written(tmp_path / "train.txt", generated_lines(300))
    temporary = tmp_path / ("x" * 110)
    temporary.mkdir()
    words = ["preprocess", "--dataset", "kaggle", "--protocol", "dlrm", "--input", str(raw), "--workers", "2"]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONIOENCODING": "ascii"}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "lightning_dlrm", *words, "--output", str(tmp_path / "ö")],
        cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE, stderr=write, check=True,
    )  # fmt: skip
    os.close(write)
    assert done.stdout.decode().endswith("xf6'\n") and (tmp_path / "ö/dataset.json").is_file()
    assert usable_cores() == len(os.sched_getaffinity(0))


def test_addresses_and_worker_processes(tmp_path: Path, days: list[Path], undisturbed: dict[str, bytes]) -> None:
    addresses: list[Any] = [days[0], *(day.as_uri() for day in days[1:])]
    output: Any = (tmp_path / "out").as_uri()
    make(addresses, output, workers=2, work=tmp_path)
    assert folder_bytes(tmp_path / "out") == undisturbed
    assert names_in(tmp_path) == {"out"}


def test_vocabulary_behind_an_address(tmp_path: Path, days: list[Path]) -> None:
    known = tmp_path / "known"
    make(days, known)
    fsspec.filesystem("memory").put(str(known), "/known", recursive=True)
    for name, vocabulary in (("local", str(known)), ("remote", "memory://known")):
        preprocess(None, None, days[:1], tmp_path / name, progress=QUIET, vocabulary=vocabulary, workers=1)
    assert folder_bytes(tmp_path / "local") == folder_bytes(tmp_path / "remote")


def test_outputs_of_one_name_share_a_working_place(tmp_path: Path) -> None:
    names = ["a/out", "b/out", "memory://c/out", "memory://d/out"]
    targets = [Target(name if "://" in name else str(tmp_path / name), tmp_path) for name in names]
    assert len({target.work for target in targets}) == len(names)
    assert {target.work.parent for target in targets} == {tmp_path}
    assert Target(str(tmp_path / "a/out"), tmp_path).work == targets[0].work, "the same command finds it again"
    assert Target("memory://c/out", None).work.name == targets[2].work.name
    assert Target(str(tmp_path / "a/out"), None).work == tmp_path / "a/.out.preprocess"


def test_missing_backend_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(fsspec.registry.target if hasattr(fsspec.registry, "target") else {}, "s3", raising=False)
    with pytest.raises(UserError, match=r"s3://bucket/day_0 needs a package that is not installed: .*s3fs") as error:
        preprocess("kaggle", "dlrm", ["s3://bucket/day_0"], tmp_path / "out", None, QUIET)
    assert "\n" not in str(error.value)

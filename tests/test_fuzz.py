"""Contract: whatever a file holds, reading it gives a value or one line for the user: no other exception, no hang, and
no memory without bound.

Inputs are mutations with fixed seeds of whole files: of their bytes, or of the values of their JSON, with checksums and
fingerprints computed again, as a stranger would.
"""

import functools
import json
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from datamodules.folder import Folder, load_schema
from datamodules.generate.profiles import Profiler, TraceSource, save_profiles
from datamodules.parquet import open_part, read_slices
from datamodules.preprocess.criteo_tsv import BadLineError, parse, parse_good
from datamodules.preprocess.inspection import summary
from datamodules.preprocess.inspection_text import render
from datamodules.preprocess.journal import discard_damaged, record, recorded
from datamodules.preprocess.pipeline import Run, Target
from datamodules.preprocess.protocols import PROTOCOLS
from datamodules.preprocess.recipe import known_recipe
from datamodules.writer import DatasetWriter
from lightning_dlrm.cli.checkpoint import info
from lightning_dlrm.cli.configs import flat, resolve_config_arguments
from lightning_dlrm.cli.parser import CommandParser, build_model_parser
from lightning_dlrm.cli.parser import parse as parse_settings
from lightning_dlrm.cli.predictions import read_predictions
from lightning_dlrm.cli.trust import admit_arguments, take_trust
from lightning_dlrm.compare.runs import read_run, settings_of
from lightning_dlrm.contracts.documents import read_yaml
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DatasetSchema, file_sha256
from lightning_dlrm.engine.checkpointing import newest_checkpoint
from lightning_dlrm.engine.retired import update_document
from lightning_dlrm.sharding.checkpoint import CheckpointReader, PieceTensors, save_checkpoint
from lightning_dlrm.sharding.plan import read_plan
from lightning_dlrm.tables.table import TablePiece
from lightning_dlrm.tracking.run_folder import RunFolder
from tests.front_door.test_frozen_files import ARCHIVE
from tests.raw_criteo import generated_lines

SLOWEST_SECONDS = 5
MOST_BYTES = 2**30

TOKENS = [
    b"", b"\0", b"\xff", b"\xc2\x9b", b"\x1b[2J", b"\r", b"\n", b"\t", b"-1", b"0", b"1e999", b"NaN", b"-Infinity",
    b"9" * 30, b"9" * 5000, b"0x1F", b"null", b"true", b"[]", b"{}", b'""', b'"\\u0000"', b'"\\ud800"', b"[" * 500,
    b"../../x", b"/etc/passwd", b"&a [*a]", b"!!python/object:os.system", b"2020-13-45", b": ", b"- ",
    b"\x7f\xff\xff\xff", b"stranger.Evil", b"{class_path: stranger.Evil}", b"os.system",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**40, 1.5, -0.0, float("nan"), float("inf"), "", "x", "../x", "\x1b[31m",
    "a" * 300, "\udc80", "label", "test", [], [[]], [0], {}, {"": {}}, {"path": "x"}, "stranger.Evil", "os.system",
    {"class_path": "stranger.Evil", "init_args": {}}, ["{class_path: stranger.Evil}"],
]  # fmt: skip

CONFIGURATION = """\
seed_everything: 1
model:
  network: {class_path: DLRM, init_args: {embedding_dim: 4, bottom_mlp: [8, 4], top_mlp: [8]}}
  table_optimizer: {class_path: SGD, init_args: {learning_rate: 10.0}}
  dense_optimizer: {class_path: torch.optim.Adagrad, init_args: {lr: 0.01}}
  schedule: Constant
data: {class_path: Criteo, init_args: {path: demo, batch_size: 64}}
trainer: {max_steps: 3, callbacks: [{class_path: Timer, init_args: {duration: {seconds: 1}}}]}
"""


def mutated(content: bytes, random_: random.Random) -> bytes:
    """Return content with some bytes changed, inserted, removed or repeated."""
    data = bytearray(content)
    for _ in range(random_.choice((1, 1, 1, 2, 8))):
        at = random_.randrange(len(data) + 1)
        end = min(len(data), at + random_.choice((0, 1, 4, 16, 200)))
        kind = random_.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            data[at:end] = random_.choice(TOKENS)
        elif kind == 2:
            data[at:at] = data[at:end]
        elif kind == 3:
            del data[at:end]
        elif kind == 4:
            data[at:end] = random_.randbytes(end - at)
        elif random_.random() < 0.2:
            del data[at:]
    return bytes(data)


def changed(document: Any, random_: random.Random) -> Any:
    """Return JSON values of which some are replaced, removed, renamed or swapped."""
    document = json.loads(json.dumps(document))
    for _ in range(random_.choice((1, 1, 2, 5))):
        if not (places := list(_places(document))):
            break
        holder, key = random_.choice(places)
        kind = random_.randrange(6)
        if kind < 3:
            holder[key] = json.loads(json.dumps(random_.choice(VALUES)))
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[random_.choice((key + "x", "../x", "", "weight", "C1"))] = holder.pop(key)
        else:
            other, at = random_.choice(places)
            if at in other if isinstance(other, dict) else at < len(other):
                holder[key] = json.loads(json.dumps(other[at]))
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


@dataclass
class World:
    """A folder with whole files of each kind."""

    root: Path
    schema: DatasetSchema

    def original(self, name: str) -> bytes:
        return (self.root / "whole" / name).read_bytes()

    def reset(self) -> None:
        """Put the whole files back where they are read."""
        shutil.rmtree(self.root)
        shutil.copytree(self.root.with_name("pristine"), self.root)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    # Of a file in memory, opening and writing take a fiftieth of the time.
    memory = Path("/dev/shm")
    base = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path_factory.getbasetemp(), prefix="fuzz-"))
    root = base / "pristine"
    root.mkdir()
    whole = root / "whole"
    whole.mkdir()
    columns = (
        Column(name="label", role="label"), Column(name="I1", role="dense"),
        Column(name="C1", role="categorical", cardinality=9), Column(name="M1", role="multi_hot", cardinality=4),
    )  # fmt: skip
    with DatasetWriter(root / "data", columns) as writer:
        for split in ("train", "test"):
            ids = np.arange(8, dtype=np.int32)
            arrays = {"label": (ids % 2).astype(np.int8), "I1": ids.astype(np.float32), "C1": ids}
            writer.write(split, {**arrays, "M1": (ids % 4, np.arange(9, dtype=np.int32))})
        report = {"rows_per_file": [["a", 16]], "missing": {"I1": 0}, "distinct": {"C1": 8}}
        writer.write_vocabulary("C1", pa.table({"id": np.arange(8, dtype=np.int32), "count": np.ones(8, np.int64)}))
        minimum = {f"I{i}": 0 for i in range(1, 14)}
        schema = writer.finish(
            dataset="kaggle", protocol="mlperf", settings={"max_rows": 9, "minimum": minimum}, report=report
        )
    (whole / "dataset.json").write_bytes((root / "data/dataset.json").read_bytes())
    (whole / "part").write_bytes((root / "data" / schema.splits["train"].files[0].path).read_bytes())
    (whole / "vocabulary").write_bytes((root / "data/vocabulary/C1.parquet").read_bytes())
    scores = {"row": np.arange(8), "probability": np.full(8, 0.5, np.float32)}
    pq.write_table(pa.table(scores), whole / "predictions")
    piece = TablePiece(name="C1", table_rows=6, start=0, stop=6, offset=0)
    tensors = {"weight": torch.rand(6, 2), "sum": torch.rand(6)}
    header = {"model": "DLRM", "encoding_fingerprint": "e", "data_fingerprint": "d", "step": 1, "epoch": 0}
    save_checkpoint(root / "checkpoints/last", [PieceTensors(piece, tensors)], {"state_dict": {}, "x": [1.5]}, header)
    for name, path in (("manifest", "manifest.json"), ("tensors", "tables/C1.0.safetensors"), ("rest", "rest.pt")):
        (whole / name).write_bytes((root / "checkpoints/last" / path).read_bytes())
    with tarfile.open(ARCHIVE) as archive:
        for name in ("config.yaml", "summary.json", "metrics.jsonl"):
            (whole / name).write_bytes(archive.extractfile(f"runs/dlrm/{name}").read())  # type: ignore[union-attr]
    (root / "run").mkdir()
    profiler = Profiler("C1", 50)
    profiler.add((np.arange(2000) % 50).astype(np.int32))
    save_profiles([profiler.profile()], whole / "profiles")
    (whole / "plan").write_text("ranks: 2\ntables:\n  C1: [[0, 100, 0], [100, 200, 1]]\n")
    record(root / "step", {"rows": 3, "missing": {"I1": 0}}, (whole / "plan",))
    (whole / "record").write_bytes((root / "step.json").read_bytes())
    run = {"version": 3, "options": {"seed": 0}, "inputs": [{"name": "a", "bytes": 1, "stamp": "2"}]}
    (whole / "report").write_text(json.dumps({"run": run, "rows": {"train": 8}}))
    lines = b"".join("\t".join(line).encode() + b"\n" for line in generated_lines(6))
    (whole / "raw").write_bytes(lines)
    (whole / "csv").write_bytes(b"label,I1\n" + lines.replace(b"\t", b","))
    (whole / "overlay").write_text(CONFIGURATION)
    (whole / "settings").write_text(json.dumps(yaml.safe_load(CONFIGURATION)))
    (base / "elsewhere").mkdir()
    (base / "elsewhere/stranger.py").write_text("class Evil: pass\n")
    shutil.copytree(root, root.with_name("now"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(base / "elsewhere")
        yield World(root.with_name("now"), schema)
    shutil.rmtree(base)


def raw(world: World, content: bytes) -> None:
    text = content if content.endswith(b"\n") else content + b"\n"
    parse_good(text)
    parse(text)


def dataset(world: World, content: bytes) -> None:
    schema = DatasetSchema.from_json(content, "dataset.json")
    render(summary(world.root / "data", schema))
    (world.root / "known").mkdir(exist_ok=True)
    (world.root / "known/dataset.json").write_bytes(content)
    if schema.protocol in PROTOCOLS and schema.vocabulary:
        known_recipe(load_schema(Folder(world.root / "known")), Folder(world.root / "known"))


def signed_dataset(world: World, content: bytes) -> None:
    """``dataset.json`` of other values and their right fingerprints."""
    document = json.loads(content)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("encoding", "data"):
            patch.setattr(DatasetSchema, f"{name}_fingerprint", name)
        document["fingerprints"] = {"encoding": "encoding", "data": "data"}
        dataset(world, json.dumps(document).encode())


def part(world: World, content: bytes) -> None:
    where = Folder(world.root / "data")
    file = world.schema.splits["train"].files[0]
    (world.root / "data" / file.path).write_bytes(content)
    file = replace(file, bytes=len(content))
    with open_part(where, world.schema, file) as opened:
        for group in range(opened.num_row_groups):
            list(read_slices(where, file, opened, group, world.schema.columns, threads=False))


def checkpoint(world: World, content: bytes, name: str = "manifest.json") -> None:
    folder = world.root / "checkpoints/last"
    (folder / name).write_bytes(content)
    reader = CheckpointReader(folder)
    json.dumps(info(reader))
    reader.verify()
    out = torch.empty(6, 2)
    reader.read_rows(TablePiece(name="C1", table_rows=6, start=0, stop=6, offset=0), "weight", out)
    newest_checkpoint(world.root / "checkpoints")


def signed_checkpoint(name: str, entry: Callable[[Any], Any]) -> Callable[[World, bytes], None]:
    """A changed file of a checkpoint, with its right size and checksum in the manifest."""

    def read(world: World, content: bytes) -> None:
        folder = world.root / "checkpoints/last"
        whole, manifest = (folder / name).read_bytes(), json.loads(world.original("manifest"))
        try:
            (folder / name).write_bytes(content)
            entry(manifest).update(bytes=len(content), sha256=file_sha256(folder / name))
            checkpoint(world, json.dumps(manifest).encode())
        finally:
            (folder / name).write_bytes(whole)

    return read


def run_file(name: str) -> Callable[[World, bytes], None]:
    def read(world: World, content: bytes) -> None:
        for other in ("config.yaml", "summary.json", "metrics.jsonl"):
            whole = (
                b"{seed_everything: 1, model: {}, data: {}, trainer: {}, wandb: {}}"
                if other == "config.yaml"
                else world.original(other)
            )
            path, found = world.root / "run" / other, content if other == name else whole
            if not path.exists() or path.read_bytes() != found:
                path.write_bytes(found)
        RunFolder(world.root / "run").final()
        run = read_run(world.root / "run")
        run.curve("samples", "train/loss")
        _ = run.settings, run.seed

    return read


def configuration(world: World, content: bytes) -> None:
    """A configuration up to the parser: the decision about its classes is made on its text, and nothing is imported."""
    path, modules = world.root / "config.yaml", set(sys.modules)
    path.write_bytes(content)
    try:
        arguments = take_trust(["--config", str(path)])
        admit_arguments(arguments)
        resolve_config_arguments(arguments)
        document = update_document(read_yaml(path))[0]
        flat(document)
        settings_of(document)
    finally:
        assert set(sys.modules) == modules


@functools.cache
def parser() -> CommandParser:
    return build_model_parser("params")


def parsed_configuration(world: World, content: bytes) -> None:
    (world.root / "config.yaml").write_bytes(content)
    try:
        parse_settings(parser(), take_trust(["--config", str(world.root / "config.yaml")]))
    finally:
        assert "stranger" not in sys.modules


def plan(world: World, content: bytes) -> None:
    (world.root / "plan.yaml").write_bytes(content)
    read_plan(world.root / "plan.yaml").check({"C1": 200}, 2)


def profiles(world: World, content: bytes) -> None:
    (world.root / "profiles.json").write_bytes(content)
    (found,) = TraceSource(world.root / "profiles.json").profiles(progress=False)
    _ = found.growth, found.accesses


def journal(world: World, content: bytes) -> None:
    (world.root / "step.json").write_bytes(content)
    recorded(world.root / "step")
    discard_damaged(world.root / "step")


def report(world: World, content: bytes) -> None:
    (world.root / "data/report.json").write_bytes(content)
    Target(str(world.root / "data"), None).finished(Run(version=3, options={"seed": 0}, inputs=()))


def vocabulary(world: World, content: bytes) -> None:
    (world.root / "data/vocabulary/C1.parquet").write_bytes(content)
    summary(world.root / "data", world.schema)


def predictions(world: World, content: bytes) -> None:
    (world.root / "predictions.parquet").write_bytes(content)
    read_predictions(world.root / "predictions.parquet", 8)


BYTES: dict[str, tuple[str, Callable[[World, bytes], None], float]] = {
    "TSV": ("raw", raw, 0.5),
    "CSV": ("csv", raw, 1),
    "dataset.json": ("dataset.json", dataset, 3),
    "Parquet": ("part", part, 3),
    "manifest": ("manifest", checkpoint, 2),
    "safetensors": (
        "tensors",
        signed_checkpoint("tables/C1.0.safetensors", lambda m: m["tables"]["C1"]["pieces"][0]),
        0.7,
    ),
    "rest.pt": ("rest", signed_checkpoint("rest.pt", lambda m: m["rest"]), 0.5),
    "configuration": ("overlay", configuration, 0.3),
    "parsed configuration": ("overlay", parsed_configuration, 0.03),
    "config.yaml of a run": ("config.yaml", run_file("config.yaml"), 0.2),
    "summary.json": ("summary.json", run_file("summary.json"), 0.5),
    "metrics.jsonl": ("metrics.jsonl", run_file("metrics.jsonl"), 0.5),
    "plan": ("plan", plan, 1),
    "profiles": ("profiles", profiles, 1),
    "journal": ("record", journal, 1),
    "report.json": ("report", report, 1),
    "predictions": ("predictions", predictions, 1),
    "vocabulary": ("vocabulary", vocabulary, 1),
}
"""Kind of file -> its original, its reader, and its share of the inputs."""
JSON: dict[str, tuple[str, Callable[[World, bytes], None], float]] = {
    "dataset.json": ("dataset.json", signed_dataset, 3),
    "manifest": ("manifest", checkpoint, 2),
    "summary.json": ("summary.json", run_file("summary.json"), 0.5),
    "profiles": ("profiles", profiles, 1),
    "journal": ("record", journal, 1),
    "report.json": ("report", report, 1),
    "configuration": ("settings", configuration, 0.2),
    "parsed configuration": ("settings", parsed_configuration, 0.03),
}
CASES = [("bytes", kind) for kind in BYTES] + [("values", kind) for kind in JSON]


def read_all(world: World, how: str, kind: str, inputs: int) -> None:
    """Read mutations of a kind of file."""
    world.reset()
    name, read, _ = (BYTES if how == "bytes" else JSON)[kind]
    original = world.original(name)
    if kind not in ("CSV", "report.json"):
        read(world, original)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(inputs):
        random_ = random.Random(zlib.crc32(f"{how} {kind} {number}".encode()))
        if how == "bytes":
            content = mutated(original, random_)
        else:
            content = json.dumps(changed(json.loads(original), random_)).encode()
        start = time.monotonic()
        try:
            read(world, content)
        except (UserError, BadLineError) as error:
            assert len(str(error)) < 3000, f"{how} {number}"
        except Exception as error:
            raise AssertionError(f"input {number} of {kind} ({how}): {content[:300]!r}") from error
        assert time.monotonic() - start < SLOWEST_SECONDS, f"input {number} of {kind} ({how})"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def shares(inputs: int) -> dict[tuple[str, str], int]:
    weights = {(how, kind): (BYTES if how == "bytes" else JSON)[kind][2] for how, kind in CASES}
    return {case: round(inputs * weight / sum(weights.values())) for case, weight in weights.items()}


@pytest.mark.parametrize(("how", "kind"), CASES)
def test_damaged_and_foreign_files(world: World, how: str, kind: str) -> None:
    read_all(world, how, kind, shares(8_000)[how, kind])


@pytest.mark.slow
@pytest.mark.parametrize(("how", "kind"), CASES)
def test_a_million_damaged_and_foreign_files(world: World, how: str, kind: str) -> None:
    read_all(world, how, kind, shares(1_000_000)[how, kind])

"""Contract: a checkpoint is whole or not there; any ranges of rows can be read back from any pieces;
damage is found before anything is used."""

import itertools
import json
import os
import pickle
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.terminal import binary_size
from lightning_dlrm.sharding import checkpoint
from lightning_dlrm.sharding.checkpoint import (
    CheckpointReader,
    PieceTensors,
    link_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)
from lightning_dlrm.sharding.collectives import reserve_port
from lightning_dlrm.tables.table import TablePiece
from tests.ranks import run_ranks

ROWS = 100


def table() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 3, generator=generator), torch.rand(ROWS, generator=generator)


def pieces(*bounds: int) -> list[PieceTensors]:
    weight, slot = table()
    return [
        PieceTensors(
            TablePiece(name="C1", table_rows=ROWS, start=a, stop=b, offset=0), {"weight": weight[a:b], "sum": slot[a:b]}
        )
        for a, b in itertools.pairwise(bounds)
    ]


def write(folder: Path, *bounds: int, **header: int) -> None:
    rest = {"dense": torch.ones(2), "loops": {"n": 3}}
    save_checkpoint(folder, pieces(*(bounds or (0, ROWS))), rest, {"step": 1} | header)


@pytest.mark.parametrize("written", [(0, ROWS), (0, 1, 37, ROWS), tuple(range(0, ROWS + 1, 10))])
@pytest.mark.parametrize("read", [(0, ROWS), (0, 40), (36, 38), (99, 100), (5, 5)])
def test_any_range_is_read_from_any_pieces(written: tuple[int, ...], read: tuple[int, int], tmp_path: Path) -> None:
    write(tmp_path / "last", *written)
    reader = CheckpointReader(tmp_path / "last")
    start, stop = read
    piece = TablePiece(name="C1", table_rows=ROWS, start=start, stop=stop, offset=0)
    for slot, whole in zip(("weight", "sum"), table(), strict=True):
        out = torch.full_like(whole[start:stop], 9.0)
        reader.read_rows(piece, slot, out)
        assert torch.equal(out, whole[start:stop])
    assert reader.rest()["loops"] == {"n": 3}
    assert reader.header == {"step": 1}


@pytest.mark.parametrize("ranks", [(0, 50, ROWS), (0, 3, 4, 60, ROWS)])
@pytest.mark.parametrize("damaged", ["C1.0", "C1.37"])
def test_ranks_that_share_a_file_hash_it_once(
    ranks: tuple[int, ...], damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "last", 0, 37, ROWS)
    hashed: list[str] = []
    sha256 = checkpoint.file_sha256
    monkeypatch.setattr(checkpoint, "file_sha256", lambda path: (hashed.append(path.name), sha256(path))[1])

    def read() -> list[UserError]:
        errors = []
        for start, stop in itertools.pairwise(ranks):
            piece = TablePiece(name="C1", table_rows=ROWS, start=start, stop=stop, offset=0)
            try:
                CheckpointReader(tmp_path / "last").read_rows(piece, "weight", torch.empty(stop - start, 3))
            except UserError as error:
                errors.append(error)
        return errors

    assert read() == [] and sorted(hashed) == ["C1.0.safetensors", "C1.37.safetensors"]
    path = tmp_path / f"last/tables/{damaged}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [f"{path} is damaged" in str(error) for error in read()] == [True]


def test_manifest_names_tables_shapes_and_pieces(tmp_path: Path) -> None:
    write(tmp_path / "last", 0, 30, ROWS)
    manifest = json.loads((tmp_path / "last/manifest.json").read_text())
    entry = manifest["tables"]["C1"]
    assert entry["shapes"] == {"weight": [ROWS, 3], "sum": [ROWS]}
    assert [(p["start"], p["stop"]) for p in entry["pieces"]] == [(0, 30), (30, ROWS)]
    files = {str(p.relative_to(tmp_path / "last")) for p in (tmp_path / "last").rglob("*") if p.is_file()}
    assert files == {"manifest.json", "rest.pt", *(p["file"] for p in entry["pieces"])}


def test_a_link_outlives_what_it_was_made_from(tmp_path: Path) -> None:
    write(tmp_path / "last", step=1)
    link_checkpoint(tmp_path / "last", tmp_path / "best")
    write(tmp_path / "last", step=2)
    assert CheckpointReader(tmp_path / "best").header["step"] == 1
    assert CheckpointReader(tmp_path / "last").header["step"] == 2
    CheckpointReader(tmp_path / "best").rest()
    assert {p.name for p in tmp_path.iterdir()} == {"best", "last"}


def test_killed_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "last", step=1)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == ".last.partial":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "last", step=2)
    monkeypatch.undo()
    assert CheckpointReader(tmp_path / "last").header["step"] == 1
    write(tmp_path / "last", step=3)
    assert CheckpointReader(tmp_path / "last").header["step"] == 3


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "last", step=1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path / "last", step=2)
    assert CheckpointReader(tmp_path / "last").header["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def whole_piece(name: str = "C1", rows: int = ROWS) -> TablePiece:
    return TablePiece(name=name, table_rows=rows, start=0, stop=rows, offset=0)


def test_damage_is_found(tmp_path: Path) -> None:
    write(tmp_path / "last")
    for name, use in {
        "tables/C1.0.safetensors": lambda r: r.read_rows(whole_piece(), "weight", torch.empty(ROWS, 3)),
        "rest.pt": lambda r: r.rest(),
    }.items():
        path = tmp_path / "last" / name
        good = path.read_bytes()
        for bad in (good[:-1], good[:-5] + bytes([good[-5] ^ 1]) + good[-4:]):
            path.write_bytes(bad)
            with pytest.raises(UserError, match="damaged"):
                use(CheckpointReader(tmp_path / "last"))
        path.unlink()
        with pytest.raises(UserError, match=f"lacks {name}"):
            CheckpointReader(tmp_path / "last")
        path.write_bytes(good)


@pytest.mark.parametrize("change", [lambda parts: parts.pop(), lambda parts: parts.append(parts[0])])
def test_pieces_that_do_not_cover_a_table_are_refused(change: Any, tmp_path: Path) -> None:
    write(tmp_path / "last", 0, 30, ROWS)
    manifest = tmp_path / "last/manifest.json"
    document = json.loads(manifest.read_text())
    change(document["tables"]["C1"]["pieces"])
    manifest.write_text(json.dumps(document))
    with pytest.raises(UserError, match="do not cover its 100 rows"):
        CheckpointReader(tmp_path / "last")


def test_other_shapes_tables_and_versions_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "last")
    reader = CheckpointReader(tmp_path / "last")
    with pytest.raises(UserError, match=r"shape \(100, 3\), this run needs \(100, 4\)"):
        reader.read_rows(whole_piece(), "weight", torch.empty(ROWS, 4))
    with pytest.raises(UserError, match="no weight for table C9"):
        reader.read_rows(whole_piece("C9"), "weight", torch.empty(ROWS, 3))
    manifest = tmp_path / "last/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 7'))
    with pytest.raises(UserError, match="format version 7"):
        CheckpointReader(tmp_path / "last")
    manifest.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        CheckpointReader(tmp_path / "last")


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        CheckpointReader(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a checkpoint folder"):
        CheckpointReader(tmp_path)


ON_TWO_RANKS = """
import sys, time
from pathlib import Path
import torch
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.sharding import checkpoint
from lightning_dlrm.sharding.collectives import Ranks, is_lost_rank, set_timeout
from tests.sharding.test_checkpoint import pieces
torch.distributed.init_process_group("gloo")
ranks, folder = Ranks(long_timeout=True), Path(sys.argv[1])

def save(step):
    checkpoint.save_checkpoint(folder, [pieces(0, 37, 100)[ranks.rank]], {"loops": {}}, {"step": step}, ranks)

save(1)
if ranks.rank == 1:
    def full(*args):
        raise OSError(28, "No space left on device")
    checkpoint.save_file = full
try:
    save(2)
except UserError as error:
    print(error)
set_timeout(1)
Ranks().run_on_all_ranks(lambda: None)
given_up = folder.with_name("given up")
while ranks.rank == 1 and not given_up.exists():
    time.sleep(0.01)
if ranks.rank == 0:
    try:
        Ranks().run_on_all_ranks(lambda: None)
    except RuntimeError as error:
        print("given up:", is_lost_rank(error))
    finally:
        given_up.touch()
"""


@pytest.mark.dist
def test_a_rank_that_fails_or_hangs_is_told_to_the_others(tmp_path: Path) -> None:
    said = run_ranks(["-c", ON_TWO_RANKS, str(tmp_path / "last")], 2)
    assert all("cannot save the checkpoint" in text and "No space left on device" in text for text in said), said
    assert "given up: True" in said[0]
    reader = CheckpointReader(tmp_path / "last")
    assert reader.header == {"step": 1} and torch.equal(slots(reader)["weight"], table()[0])
    assert {path.name for path in tmp_path.iterdir()} == {"last", "given up"}


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["HARM"],)


def test_no_code_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harm = tmp_path / "harm"
    monkeypatch.setenv("HARM", str(harm))
    save_checkpoint(tmp_path / "last", pieces(0, ROWS), {"loops": Harmful()}, {"step": 1})
    with pytest.raises(UserError, match="more than tensors and plain values"):
        CheckpointReader(tmp_path / "last").rest()
    assert not harm.exists()
    pickle.loads(pickle.dumps(Harmful()))
    assert harm.exists(), "the trap works"


def slots(reader: CheckpointReader) -> dict[str, Tensor]:
    found = {}
    for slot, whole in zip(("weight", "sum"), table(), strict=True):
        found[slot] = torch.empty_like(whole)
        reader.read_rows(whole_piece(), slot, found[slot])
    return found


def test_merged_and_cut_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, whole, cut = (str(tmp_path / name) for name in ("last", "whole", "cut"))
    write(Path(source), 0, 7, 40, ROWS, step=9, epoch=0)
    assert main(["checkpoint", "merge", source, "--output", whole]) == 0
    assert main(["checkpoint", "reshard", whole, "--ranks", "4", "--output", cut]) == 0
    capsys.readouterr()
    for path, is_cut in ((whole, False), (cut, True)):
        assert main(["checkpoint", "info", path, "--verify", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["header"] == {"step": 9, "epoch": 0} and (len(found["tables"]["C1"]["pieces"]) > 1) == is_cut
        reader = CheckpointReader(Path(path))
        assert torch.equal(slots(reader)["weight"], table()[0]) and torch.equal(slots(reader)["sum"], table()[1])
        assert reader.rest()["loops"] == {"n": 3}
    plan = tmp_path / "plan.yaml"
    plan.write_text("ranks: 2\ntables: {C1: [[0, 30, 1], [30, 100, 0]]}")
    assert main(["checkpoint", "reshard", cut, "--plan", str(plan), "--output", str(tmp_path / "planned")]) == 0
    entry = CheckpointReader(tmp_path / "planned").manifest.tables["C1"]
    assert [(part.start, part.stop) for part in entry.pieces] == [(0, 30), (30, 100)]
    capsys.readouterr()
    assert main(["checkpoint", "info", str(tmp_path / "planned")]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in (tmp_path / "planned").glob("**/*.*") if path.name != "manifest.json")
    assert lines[0] == str(tmp_path / "planned") and lines[1].split() == ["step", "9"]
    assert lines[2].split() == ["epoch", "1", "(counted", "from", "1)"]
    assert re.fullmatch(r"rest\.pt +[\d.]+ \w+: dense layers, optimizer state, callbacks", lines[3])
    assert lines[4].split(maxsplit=1) == ["size", f"{binary_size(size)} in 3 files and manifest.json"]
    row, total = lines[-6], lines[-5]
    assert lines[-3] == "sum: sum of the squared gradients (Adagrad)"
    assert row.split()[:4] == ["C1", "100", "3", "2"] and row.endswith("  sum: 1 a row")
    assert total.split()[:3] == ["all", "100", "2"]
    assert lines[-1] == "checksums were not compared: --verify compares them" and max(map(len, lines[1:])) < 80


def test_a_folder_of_checkpoints_is_no_checkpoint_and_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("best", "last"):
        write(tmp_path / "run/checkpoints" / name)
    for folder in (tmp_path / "run", tmp_path / "run/checkpoints"):
        assert main(["checkpoint", "info", str(folder)]) == 2
        inner = tmp_path / "run/checkpoints"
        said = f"error: {folder} is not a checkpoint, but a folder with checkpoints: give {inner / 'best'}"
        assert capsys.readouterr().err == f"{said} or {inner / 'last'}\n"


def test_what_cannot_be_written_again_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "last")
    arguments = ["checkpoint", "reshard", str(tmp_path / "last"), "--output"]
    assert main([*arguments, str(tmp_path / "last"), "--ranks", "2"]) == 2
    assert "exists; give another folder" in capsys.readouterr().err
    (tmp_path / "plan.yaml").write_text("ranks: 2\ntables: {C1: [[0, 30, 1]]}")
    assert main([*arguments, str(tmp_path / "new"), "--plan", str(tmp_path / "plan.yaml")]) == 2
    assert "the plan has 30 rows for table C1, the model has 100" in capsys.readouterr().err
    path = tmp_path / "last/tables/C1.0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert main(["checkpoint", "info", str(tmp_path / "last"), "--verify"]) == 2
    assert "is damaged (its checksum differs)" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_only_a_store_is_given_a_reserved_port() -> None:
    with reserve_port() as held, socket.socket() as other:
        port = held.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # noqa: TID251
        store.set("name", "value")
        assert store.get("name") == b"value"


REPORTS = """
import torch.distributed as dist
from lightning_dlrm.sharding.collectives import is_first_to_report
dist.init_process_group("gloo")
rank = dist.get_rank()
of_all, of_one = is_first_to_report(f"shape ({rank + 7}, 1)"), rank == 1 and is_first_to_report("of rank 1 alone")
dist.barrier()
print(of_all, of_one, "of rank", rank)
dist.destroy_process_group()
"""


def test_an_error_of_several_ranks_is_reported_by_one() -> None:
    said = sorted(text.strip().splitlines()[-1] for text in run_ranks(["-c", REPORTS], 2))
    assert said in (["False True of rank 1", "True False of rank 0"], ["False False of rank 0", "True True of rank 1"])


def test_a_misspelt_folder_of_a_checkpoint_is_named_with_its_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/first/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"there is no folder runs/frist; did you mean runs/first\?$"):
        resolve_checkpoint(Path("runs/frist/checkpoints/best"))
    with pytest.raises(UserError, match="there is no folder other; expected a folder such as runs/NAME"):
        resolve_checkpoint(Path("other/checkpoints/best"))

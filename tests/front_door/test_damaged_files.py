"""Contract: a damaged file, or a stranger's, is refused in one line; nothing is written outside of the output."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.documents import MAX_BYTES
from lightning_dlrm.contracts.schema import file_sha256
from tests.front_door.test_frozen_files import ARCHIVE

MANIFEST = Path("runs/dlrm/checkpoints/last/manifest.json")


@pytest.fixture(autouse=True)
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "inside", filter="data")
    monkeypatch.chdir(tmp_path / "inside")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line on stderr of a command that is refused."""
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    "content", [b"null", b"[]", b"\xff\xfe{}", b"", b'{"format_version": 1}', b"[" * 100_000], ids=lambda c: repr(c[:9])
)
@pytest.mark.parametrize(
    ("path", "command"),
    [
        (MANIFEST, "checkpoint info runs/dlrm/checkpoints/last"),
        (Path("dataset/dataset.json"), "inspect dataset"),
        (Path("runs/dlrm/summary.json"), "compare runs/dlrm runs/dcn --output out"),
    ],
    ids=["manifest", "dataset", "summary"],
)
def test_json_of_another_form(content: bytes, path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(content)
    line = refusal(capsys, *command.split())
    assert path.name in line or (b"{" in content and "is not finished" in line)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d | {"tables": {"../../../escaped": d["tables"]["C1"]}},
        lambda d: d | {"tables": {"/tmp/escaped": d["tables"]["C1"]}},
        lambda d: d | {"rest": d["rest"] | {"file": "../best/rest.pt"}},
        lambda d: d | {"rest": d["rest"] | {"bytes": "12"}},
        lambda d: d | {"tables": {"C1": d["tables"]["C1"] | {"shapes": {}}}},
    ],
    ids=["table above", "absolute table", "file above", "text for a number", "no shapes"],
)
def test_manifest_that_leads_out_of_its_folder(
    edit: Callable[[Any], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(MANIFEST, edit)
    before = {path for path in tmp_path.rglob("*") if "merged" not in str(path)}
    assert "manifest.json" in refusal(capsys, "checkpoint", "merge", str(MANIFEST.parent), "--output", "merged/a")
    assert {path for path in tmp_path.rglob("*") if "merged" not in str(path)} == before


def test_link_out_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = MANIFEST.parent / "rest.pt"
    file.rename(tmp_path / "rest.pt")
    file.symlink_to(tmp_path / "rest.pt")
    assert "rest.pt" in refusal(capsys, "checkpoint", "info", str(MANIFEST.parent))


@pytest.mark.parametrize("path", ["../train.parquet", "/etc/passwd", "train/../../x"])
def test_dataset_with_files_elsewhere(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(document: Any) -> Any:
        document["splits"]["train"]["files"][0]["path"] = path
        return document

    change(Path("dataset/dataset.json"), edit)
    assert path in refusal(capsys, "inspect", "dataset")


def test_resume_takes_the_next_checkpoint_and_refuses_if_none_is_whole(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fit = ["fit", "--config", "runs/dlrm/config.yaml", "--run_dir", "runs/dlrm", "--resume", "auto"]
    # A hard link of the same file in ``best``.
    MANIFEST.unlink()
    MANIFEST.write_text("null")
    Path("runs/dlrm/summary.json").write_text("")
    assert main(fit) == 0
    assert "skipping a damaged or incomplete checkpoint" in caplog.text
    assert json.loads(Path("runs/dlrm/summary.json").read_text())["final"]
    metrics = Path("runs/dlrm/metrics.jsonl").read_bytes()
    for manifest in Path("runs/dlrm/checkpoints").rglob("manifest.json"):
        manifest.write_text("{}")
    assert "--run_dir" in refusal(capsys, *fit)
    assert Path("runs/dlrm/metrics.jsonl").read_bytes() == metrics


def signed(edit: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return an edit of a manifest's first table that also corrects the size and checksum of its file."""

    def change_entry(document: Any) -> Any:
        (part,) = document["tables"]["C1"]["pieces"]
        path = MANIFEST.parent / part["file"]
        edit(path)
        part.update(bytes=path.stat().st_size, sha256=file_sha256(path))
        return document

    return change_entry


@pytest.mark.parametrize(
    "edit",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
        lambda path: save_file({"weight": torch.zeros(2**18, 1)}, path),
        lambda path: save_file({name: value.long() for name, value in load_file(path).items()}, path),
    ],
    ids=["truncated", "size of the header", "other shape", "other type"],
)
def test_tensors_that_do_not_fit_the_manifest(edit: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]) -> None:
    change(MANIFEST, signed(edit))
    for command in (["merge", "--output", "merged"], ["info", "--verify"]):
        line = refusal(capsys, "checkpoint", command[0], str(MANIFEST.parent), *command[1:])
        assert "C1.0.safetensors" in line and "free disk space" not in line
    assert not Path("merged").exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x80\x02]q\x00.", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f"]
)
def test_rest_of_any_damage(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = MANIFEST.parent / "rest.pt"
    path.write_bytes(content)
    signature = {"bytes": len(content), "sha256": file_sha256(path)}
    change(MANIFEST, lambda document: document | {"rest": document["rest"] | signature})
    assert "rest.pt" in refusal(capsys, "checkpoint", "info", str(MANIFEST.parent), "--verify")


def test_every_damaged_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("C1", "C2"):
        path = MANIFEST.parent / f"tables/{name}.0.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    line = refusal(capsys, "checkpoint", "info", str(MANIFEST.parent), "--verify")
    assert "C1.0.safetensors" in line and "C2.0.safetensors" in line


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d | {"later": 1}, "later"),
        (lambda d: d | {"columns": [*d["columns"], {**d["columns"][0], "name": "x", "kind": 1}]}, "kind"),
        (lambda d: d | {"dataset": "\x1b[2J"}, "control characters"),
        (lambda d: d | {"dataset": "a\u202eb"}, "control characters"),
        (lambda d: d | {"dataset": "a\nerror: b"}, "is not a name"),
        (lambda d: d | {"protocol": "p" * 300}, "is not a name"),
        (lambda d: d | {"settings": {"x": float("nan")}}, "damaged"),
        (lambda d: d | {"columns": []}, "no columns"),
        (lambda d: d | {"report": {"pad": "x" * MAX_BYTES}}, "bytes"),
    ],
)
def test_dataset_with_what_no_dataset_has(
    edit: Callable[[Any], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(Path("dataset/dataset.json"), edit)
    line = refusal(capsys, "inspect", "dataset")
    assert message in line and line.isprintable()


def test_a_pipe_in_place_of_a_file_does_not_hang(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/dlrm/summary.json").unlink()
    os.mkfifo("runs/dlrm/summary.json")
    assert "is not a file" in refusal(capsys, "compare", "runs/dlrm", "runs/dcn", "--output", "out")


def test_dataset_of_another_version(capsys: pytest.CaptureFixture[str]) -> None:
    change(Path("dataset/dataset.json"), lambda document: {"format_version": 99})
    assert "format version 99" in refusal(capsys, "inspect", "dataset")


def test_metrics_without_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Path("runs/dlrm/metrics.jsonl").open("a") as file:
        file.write("null\n")
    assert "metrics.jsonl" in refusal(capsys, "compare", "runs/dlrm", "runs/dcn", "--output", "out")


def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    Path("deep.yaml").write_text("model: " + "[" * 4000 + "]" * 4000)
    dlrm = ["--config", "dlrm.yaml"]
    assert "deep.yaml" in refusal(capsys, "params", *dlrm, "--config", "deep.yaml")
    line = refusal(capsys, "params", *dlrm, "--model.table_optimizer.learning_rate", "null")
    assert "learning_rate is null" in line
    fit = ["fit", "--config", "runs/dlrm/config.yaml", "--run_dir"]
    assert "name too long" in refusal(capsys, *fit, "r" * 300)
    large = ["--model.network.embedding_dim", "100000000", "--model.network.bottom_mlp", "[64, 100000000]"]
    assert "of memory" in refusal(capsys, *fit, "big", *large)


@pytest.mark.parametrize(
    ("path", "command", "advice"),
    [
        ("runs/dcn/config.yaml", "compare runs/dlrm runs/dcn --output out", "restore the file from a copy"),
        ("runs/dcn/config.yaml", "validate --config runs/dcn/config.yaml", "expected a configuration"),
        ("plan.yaml", "plan --config dlrm.yaml --ranks 2 --plan plan.yaml", "plan --output FILE' wrote"),
        ("arms.yaml", "compare --config arms.yaml --output out", "expected an experiment such as figure5.yaml"),
    ],
)
@pytest.mark.parametrize("content", [b"a: [", b"\xff", b"[]"], ids=["not closed", "not UTF-8", "a list"])
def test_yaml_of_another_form(
    path: str, command: str, advice: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(path).write_bytes(content)
    line = refusal(capsys, *command.split())
    assert path in line and advice in line


@pytest.mark.parametrize(
    "command",
    [
        "compare runs/dlrm runs/dcn --dry-run",
        "fit --config runs/dcn/config.yaml",
        "predict --config runs/dcn/config.yaml --ckpt_path runs/dcn/checkpoints/best",
        "params --config runs/dcn/config.yaml",
    ],
)
def test_run_of_a_stranger_names_no_classes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In the user's own configurations a module of the current folder would do.
    Path("callbacks_here.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(Path.cwd())
    config = Path("runs/dcn/config.yaml")
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"] = [{"class_path": "callbacks_here.Mine"}]
    config.write_text(yaml.safe_dump(settings))
    assert "add --trust callbacks_here" in refusal(capsys, *command.split())
    if command.startswith("compare"):
        # It parses the configuration of one run for each dataset.
        assert main([*command.split(), "--trust", "callbacks_here"]) == 0
        return
    with pytest.raises(SystemExit, match="imported"):
        main([*command.split(), "--trust", "callbacks_here"])


@pytest.mark.parametrize("section", ["seed_everything", "trainer", "wandb"])
def test_configuration_of_a_run_without_a_section(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path("runs/dcn/config.yaml")
    settings = yaml.safe_load(config.read_text())
    for value in (None, "x"):
        config.write_text(yaml.safe_dump(settings | {section: value}))
        line = refusal(capsys, "compare", "runs/dlrm", "runs/dcn", "--dry-run")
        assert f"config.yaml has no {section}" in line and "restore the file" in line

"""Contract: every notebook runs, on small data of its own, and what lies in the repository is its output.

The sizes that a notebook gives its commands are cut here; everything else runs as it is.
"""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lightning_dlrm.__main__ import main
from tests.caches import new_cache
from tests.forked import interpreter

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALLER = {
    "01_data": {'"--rows", "200000"': '"--rows", "6000"'},
    "02_train": {
        '"--trainer.max_steps", "120"': '"--trainer.max_steps", "24"',
        '"--trainer.val_check_interval", "20"': '"--trainer.val_check_interval", "8"',
        '"--data.batch_size", "1024"': '"--data.batch_size", "256"',
        '"--data.demo.max_table_rows", "20000"': (
            '"--data.demo.max_table_rows", "1000", "--data.demo.train_rows", "8192", '
            '"--data.demo.validation_rows", "2048", "--data.demo.test_rows", "2048"'
        ),
    },
    "03_dlrm_vs_dcn": {
        "for seed in (1, 2, 3, 4):": "for seed in (1, 2):",
        '"--trainer.max_steps", "60"': '"--trainer.max_steps", "8"',
        '"--trainer.val_check_interval", "12"': '"--trainer.val_check_interval", "4"',
        '"--data.batch_size", "1024"': '"--data.batch_size", "256"',
        '"--data.demo.train_rows", "61440"': '"--data.demo.train_rows", "4096"',
        '"--data.demo.validation_rows", "8192"': '"--data.demo.validation_rows", "2048"',
        '"--data.demo.max_table_rows", "20000"': (
            '"--data.demo.max_table_rows", "1000", "--data.demo.test_rows", "2048"'
        ),
    },
}
"""Notebook -> text of its first cell -> what takes its place."""


def pictures(notebook: nbformat.NotebookNode) -> list[int]:
    """How many figures each code cell shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A Jupyter kernel that need not import torch and Lightning, with folders of its own."""
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", new_cache(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("work")))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    kernel = {"argv": [interpreter(), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    kernels = tmp_path_factory.mktemp("jupyter")
    (kernels / "kernels/forked").mkdir(parents=True)
    (kernels / "kernels/forked/kernel.json").write_text(json.dumps(kernel | {"display_name": "forked"}))
    monkeypatch.setenv("JUPYTER_PATH", str(kernels))
    # As ipykernel sets it, too late for such a process.
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")


def execute(notebook: nbformat.NotebookNode, changes: dict[str, str]) -> None:
    """Run a notebook, with texts of its first cell replaced."""
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for given, replacement in changes.items():
        assert given in cell.source
        cell.source = cell.source.replace(given, replacement)
    before = {entry.name for entry in FOLDER.iterdir()}
    client = NotebookClient(notebook, timeout=300, kernel_name="forked", resources={"metadata": {"path": FOLDER}})
    client.execute()
    assert {entry.name for entry in FOLDER.iterdir()} == before, "its files go elsewhere"


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    committed = pictures(notebook)
    execute(notebook, SMALLER.get(path.stem, {}))
    assert pictures(notebook) == committed


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.usefixtures("kernel")
def test_data_and_runs_of_any_kind_are_shown(tmp_path: Path) -> None:
    """Other columns than Criteo's, and another network; norms are shown if they were logged."""
    csv, schema, data = (str(tmp_path / name) for name in ("log/clicks.csv", "log.yaml", "data"))
    for command in (
        ["generate", "log", "--form", "shop", "--rows", "4000", "--output", str(tmp_path / "log")],
        ["preprocess", "--infer", schema, "--label", "clicked", "--input", csv],
        ["preprocess", "--schema", schema, "--input", csv, "--output", data],
    ):
        assert main(command) == 0
    notebook = nbformat.read(FOLDER / "01_data.ipynb", as_version=4)
    committed = pictures(notebook)
    execute(notebook, {"DATA = None": f"DATA = {data!r}"})
    # This log has no missing values to draw.
    assert pictures(notebook) == [committed[0], 0, *committed[2:]]
    fit = ["fit", "--config=dcn.yaml", "--config=own_data.yaml", "--data.path", data, "--trainer.max_steps=20"]
    fit += ["--data.batch_size=64", "--wandb.mode=disabled"]
    for run, norms in (("plain", "false"), ("norms", "true")):
        assert (
            main([*fit, "--run_dir", str(tmp_path / run), "--log_norms", norms, "--trainer.log_every_n_steps=2"]) == 0
        )
        notebook = nbformat.read(FOLDER / "02_train.ipynb", as_version=4)
        committed = pictures(notebook)
        execute(notebook, {"RUN = None": f"RUN = {str(tmp_path / run)!r}"})
        assert pictures(notebook) == (committed if norms == "true" else [*committed[:-1], 0])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_was_run_in_order(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert sum(pictures(notebook)) >= 3
    assert path.stat().st_size < 500_000, "figures that print well need less"

"""Contract: the wheel is what runs, wherever it is started, and whatever folders the current folder holds."""

from pathlib import Path

import pytest

from tests.front_door.conftest import Shell


@pytest.fixture
def project(shell_environment: dict[str, str], tmp_path: Path) -> Shell:
    """A folder with packages of the same names as ours, as Lightning templates have them, and a class of its own."""
    for name in ("datamodules", "configs", "models"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the package of the current folder')")
    (tmp_path / "lightning_dlrm").mkdir()
    (tmp_path / "own.py").write_text("from lightning_dlrm.models.dlrm import DLRM\n\n\nclass Mine(DLRM):\n    pass\n")
    return Shell(tmp_path, shell_environment)


def test_packages_of_the_current_folder_replace_none_of_ours(project: Shell) -> None:
    done = project.cli("generate", "tsv", "--rows", "10", "--output", "train.txt")
    assert (done.code, len((project.folder / "train.txt").read_text().splitlines())) == (0, 10), done.output
    # What pip writes as the script.
    Path(project.folder, "bin").mkdir()
    entry = "import sys\nfrom lightning_dlrm.__main__ import main\nsys.exit(main())\n"
    Path(project.folder, "bin/lightning-dlrm").write_text(entry)
    params = ["params", "--config", "dlrm.yaml", "--model.network", "own.Mine"]
    script = project.forked(["bin/lightning-dlrm", *params], project.environment, 300)
    for done in (project.python("-m", "lightning_dlrm", *params), script):
        assert done.code == 0 and "540,677,217" in done.output, done.output


def test_the_imported_package_is_the_wheels(shell: Shell, installed: Path) -> None:
    done = shell.python(
        "-c", "import lightning_dlrm, datamodules; print(*lightning_dlrm.__path__, *datamodules.__path__)"
    )
    assert done.output.split() == [str(installed / "lightning_dlrm"), str(installed / "datamodules")]

"""Contract: ``import lightning_dlrm`` offers the public names at no cost, to programs and to type checkers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_dlrm

PACKAGE = Path(lightning_dlrm.__file__)


def test_every_name_is_offered_and_declared_to_type_checkers() -> None:
    for name in lightning_dlrm.__all__:
        assert getattr(lightning_dlrm, name).__name__ == name
    assert set(lightning_dlrm.__all__) <= set(dir(lightning_dlrm))
    [block] = [node for node in ast.parse(PACKAGE.read_text()).body if isinstance(node, ast.If)]
    declared = {
        name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert declared == {name: getattr(lightning_dlrm, name).__module__ for name in lightning_dlrm.__all__}
    assert (PACKAGE.parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'DLMR'"):
        lightning_dlrm.DLMR  # noqa: B018


def test_importing_the_package_loads_no_framework() -> None:
    script = "import lightning_dlrm, sys; assert not {'torch', 'pytorch_lightning', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)

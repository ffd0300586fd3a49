"""The first lines of a command: what runs on what, and a precision that is slow there."""

import platform
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.accelerators import CPUAccelerator

from datamodules.criteo import Criteo
from datamodules.generate.demo import DemoSettings
from lightning_dlrm.cli.report import precision_note, setup_note


def trainer(precision: str, ranks: int = 1) -> SimpleNamespace:
    return SimpleNamespace(accelerator=CPUAccelerator(), world_size=ranks, precision=precision)


def test_the_first_line_says_only_what_is_known_before_ranks_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    schema = Criteo("demo", demo=DemoSettings()).schema
    begin = "DLRM on demo data, batch 2,048, float32, "
    assert setup_note("DLRM", schema, 2048, trainer("32-true")) == f"{begin}2 CPU cores"
    # Lightning gives each of two ranks one of the cores.
    assert setup_note("DLRM", schema, 2048, trainer("32-true", ranks=2)) == f"{begin}2 ranks on CPU cores"


@pytest.mark.parametrize(
    ("precision", "capability", "machine", "slow"),
    [
        ("bf16-mixed", "AVX2", "x86_64", True),
        ("bf16-true", "DEFAULT", "AMD64", True),
        ("bf16-mixed", "AVX512", "x86_64", False),
        ("bf16-mixed", "DEFAULT", "arm64", False),
        ("32-true", "AVX2", "x86_64", False),
    ],
)
def test_bfloat16_without_its_instructions_is_named(
    precision: str, capability: str, machine: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert ("--trainer.precision 32-true is faster here" in precision_note(trainer(precision))) is slow

"""Contract: a checkpoint that the first release wrote is resumed with the losses that release went on to have.

``first_release/dlrm`` is a DLRM on the toy data, saved at step 20: row-wise Adagrad 0.1 for the tables,
Adagrad 0.05 for the dense layers.
"""

import shutil
from functools import partial
from pathlib import Path

import pytest

from lightning_dlrm.optim.schedules import WarmupQuadraticDecay
from tests.engine.test_fit import losses, trainer_of
from tests.toy import ToyData, toy_module

LATER = {21: 0.6562156677246094, 30: 0.628713846206665, 40: 0.6447031497955322}


def test_its_checkpoint_goes_on_as_it_did(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(Path(__file__).parents[1] / "frozen/first_release/dlrm", checkpoint)
    module = toy_module(schedule=partial(WarmupQuadraticDecay, warmup_steps=5, decay_start_step=10, decay_steps=15))
    trainer_of(tmp_path / "run", max_steps=40, max_epochs=-1).fit(module, ToyData(), ckpt_path=checkpoint)
    found = losses(tmp_path / "run")
    # Other machines and releases of torch sum in another order.
    assert {step: found[step] for step in LATER} == pytest.approx(LATER, rel=1e-4)
    assert min(found) == 21

"""Contract: a fit under Lightning is a plain training loop; it can be stopped, resumed and
repeated to the last bit, and keeps what it did in the run folder."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.optim.lr_scheduler import OneCycleLR

from lightning_dlrm.cli.report import final_report
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.checkpointing import FolderCheckpointIO, RunCheckpoints, newest_checkpoint
from lightning_dlrm.engine.metrics_logger import EvaluationWriter, MetricsLogger
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.stopping import FinalValidation
from lightning_dlrm.objectives.metrics import click_metrics
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD, Adam, RowWiseAdagrad
from lightning_dlrm.optim.schedules import WarmupQuadraticDecay, WarmupThenDecay
from lightning_dlrm.tracking.run_folder import JsonLinesLogger, RunFolder
from tests.toy import ToyData, ToyLoader, optimizer_of, toy_dcn, toy_dlrm, toy_module, toy_schema, wide_dlrm


def trainer_of(
    folder: Path, *, every: int = 0, callbacks: list[pl.Callback] | None = None, **options: Any
) -> pl.Trainer:
    run = RunFolder(folder)
    folder.mkdir(exist_ok=True)
    checkpoints = RunCheckpoints(run, every)
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(
        logger=JsonLinesLogger(run),
        callbacks=[FinalValidation(), MetricsLogger(run, checkpoints), checkpoints, *(callbacks or [])],
        plugins=[FolderCheckpointIO()],
        **(defaults | options),
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in lines(folder) if "train/loss" in line}


def all_but_speed(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines(folder)]


DECAY = partial(WarmupQuadraticDecay, warmup_steps=5, decay_start_step=10, decay_steps=15)


class StopAt(pl.Callback):
    """Dies in mid-epoch, as a killed process would: nothing is saved on the way out."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


@pytest.mark.parametrize("network", [toy_dlrm, toy_dcn])
def test_fit_equals_a_hand_written_loop(network: Any, tmp_path: Path) -> None:
    schedule = partial(WarmupQuadraticDecay, warmup_steps=5, decay_start_step=10, decay_steps=10)
    module = toy_module(network, RowWiseAdagrad(0.1), partial(torch.optim.Adagrad, lr=0.05), schedule)
    trainer_of(tmp_path / "run", max_epochs=2).fit(module, ToyData())

    plain = network(toy_schema().features, 3)
    dense = torch.optim.Adagrad(plain.dense_parameters(), lr=0.05)
    tables = CTROptimizer([], plain.lookups(), torch.optim.SGD, RowWiseAdagrad(0.1))
    schedules = schedule(dense), schedule(tables)
    expected = []
    for batch in [*ToyLoader("train", 50).batches, *ToyLoader("train", 50).batches]:
        dense.zero_grad()
        tables.zero_grad()
        logits = plain(batch.dense, batch.ids)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.label.float())
        loss.backward()
        for part in (dense, tables, *schedules):
            part.step()
        expected.append(loss.item())
    ours = losses(tmp_path / "run")
    assert list(ours) == list(range(1, 29))
    assert list(ours.values()) == pytest.approx(expected, rel=1e-6)
    for a, b in zip(module.network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_repeated_fit_gives_the_same_bits(tmp_path: Path) -> None:
    for name in ("a", "b"):
        trainer_of(tmp_path / name).fit(toy_module(), ToyData())
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_linear_terms_with_a_rule_of_their_own_are_resumed_to_the_last_bit(tmp_path: Path) -> None:
    def module() -> CTRModule:
        return toy_module(wide_dlrm, schedule=DECAY, wide_rule=Adam(0.01))

    trainer_of(tmp_path / "whole", every=1).fit(module(), ToyData())
    with pytest.raises(InterruptedError):
        trainer_of(tmp_path / "run", every=1, callbacks=[StopAt(9)]).fit(module(), ToyData())
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    trainer_of(tmp_path / "run", every=1).fit(module(), ToyData(), ckpt_path=newest)
    assert all_but_speed(tmp_path / "run") == all_but_speed(tmp_path / "whole")
    assert lines(tmp_path / "run")[-2]["learning_rate/wide"] < 0.01


@pytest.mark.parametrize(
    ("options", "stops"),
    [({}, (9, 14)), ({"val_check_interval": 4, "check_val_every_n_epoch": None}, (1, 9, 14, 23))],
    ids=["each epoch", "every 4 steps"],
)
def test_resumed_fit_goes_on_with_the_same_losses(options: dict, stops: tuple[int, ...], tmp_path: Path) -> None:
    options = {"max_epochs": 2, "every": 1, **options}
    whole = toy_module(schedule=DECAY)
    trainer_of(tmp_path / "whole", **options).fit(whole, ToyData())

    for stop in stops:
        run = tmp_path / f"stopped at {stop}"
        with pytest.raises(InterruptedError):
            trainer_of(run, callbacks=[StopAt(stop)], **options).fit(toy_module(schedule=DECAY), ToyData())
        resumed = toy_module(schedule=DECAY)
        trainer_of(run, **options).fit(resumed, ToyData(), ckpt_path=newest_checkpoint(run / "checkpoints"))

        assert all_but_speed(run) == all_but_speed(tmp_path / "whole"), stop
        validated = [[line["step"] for line in lines(f) if "validation/auc" in line] for f in (run, tmp_path / "whole")]
        assert validated[0] == validated[1], stop
        assert [line["samples"] for line in lines(run)] == [line["samples"] for line in lines(tmp_path / "whole")], stop
        for a, b in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
            assert torch.equal(a, b), stop


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2}, 28),
        ({"max_epochs": 2, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 30}, 30),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 8),
    ],
)
def test_a_schedule_over_the_fit_ends_with_it(options: dict, steps: int, tmp_path: Path) -> None:
    class Counted(ToyData):
        training_batches = 14

    trainer_of(tmp_path / "run", **options).fit(
        toy_module(schedule=partial(WarmupThenDecay, decay_share=1.0)), Counted()
    )
    rates = [line["learning_rate/dense"] for line in lines(tmp_path / "run") if "train/loss" in line]
    assert len(rates) == steps
    assert rates == pytest.approx([0.05 * (1 - k / steps) ** 2 for k in range(steps)], abs=1e-12)


def test_a_schedule_over_a_fit_of_unknown_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set trainer\.max_steps"):
        trainer_of(tmp_path / "run").fit(toy_module(schedule=WarmupThenDecay), ToyData())


def test_a_cycle_is_not_trained_past_its_end(tmp_path: Path) -> None:
    class Counted(ToyData):
        training_batches = 14

    def fit(steps: int, checkpoint: Path | None, **options: Any) -> None:
        cycle = partial(OneCycleLR, max_lr=0.05, cycle_momentum=False, **options)
        trainer_of(tmp_path / "run", max_steps=steps).fit(toy_module(schedule=cycle), Counted(), ckpt_path=checkpoint)

    with pytest.raises(UserError, match="OneCycleLR ends at step 4"):
        fit(5, None, total_steps=4)
    fit(4, None)
    config = (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(UserError, match="OneCycleLR ends at step 4"):
        fit(5, tmp_path / "run/checkpoints/last")
    assert (tmp_path / "run/metrics.jsonl").read_text() == config


def test_a_finished_run_resumed_keeps_its_results(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer_of(run).fit(toy_module(), ToyData())
    kept = {name: (run / name).read_text() for name in ("summary.json", "metrics.jsonl")}
    trainer_of(run).fit(toy_module(), ToyData(), ckpt_path=newest_checkpoint(run / "checkpoints"))
    assert kept == {name: (run / name).read_text() for name in kept}
    assert json.loads(kept["summary.json"])["final"]["step"] == 14
    # Killed after its last checkpoint: it is finished by the same command, though nothing is left to train.
    (run / "summary.json").unlink()
    trainer_of(run).fit(toy_module(), ToyData(), ckpt_path=newest_checkpoint(run / "checkpoints"))
    before, after = (json.loads(text) for text in (kept["summary.json"], (run / "summary.json").read_text()))
    assert after["best"] == before["best"] and after["final"].keys() == before["final"].keys()
    told = [name for name in before["final"] if not name.startswith(("speed/", "memory/"))]
    assert all(after["final"][name] == before["final"][name] for name in told)


def test_a_fit_killed_before_it_logged_anything_ends_with_what_is_known(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"every": 2, "log_every_n_steps": 100, "limit_val_batches": 0}
    with pytest.raises(InterruptedError):
        trainer_of(run, callbacks=[StopAt(3)], **options).fit(toy_module(), ToyData())
    trainer_of(run, max_steps=2, **options).fit(toy_module(), ToyData(), ckpt_path=run / "checkpoints/last")
    final = json.loads((run / "summary.json").read_text())["final"]
    assert final["samples"] == 100 and "speed/data_wait_share" not in final
    assert final["speed/samples_per_s"] == pytest.approx(100 / final["speed/training_s"])
    said = final_report(RunFolder(run), final, {}, toy_schema(), None)
    assert said.startswith("\nno validation was made\n") and "samples/s" in said and "waiting" not in said


def test_the_report_of_a_fit_on_demo_data_says_how_good_it_is(tmp_path: Path) -> None:
    trainer_of(tmp_path).fit(toy_module(), ToyData())
    final = json.loads((tmp_path / "summary.json").read_text())["final"]
    final |= {"validation/auc": 0.6666, "data/optimum_auc": 0.7977}
    folder, schema = RunFolder(tmp_path), replace(toy_schema(), dataset="demo")
    said = final_report(folder, final, {}, schema, None)
    assert "\nDEMO DATA: AUC 0.6666; best reachable 0.7977 (56.0% of the way from 0.5 to it)\n" in said
    final["validation/auc"] = 0.475
    assert "\nDEMO DATA: AUC 0.4750; best reachable 0.7977\n" in final_report(folder, final, {}, schema, None)
    said = final_report(folder, final, {}, schema, None, chance="AUC 0.4750 is no better than random predictions")
    assert "\ndid not train: AUC 0.4750 is no better than random predictions\n" in said and "DEMO DATA" not in said


def test_a_fit_without_validation_leaves_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer_of(run, limit_val_batches=0).fit(toy_module(), ToyData())
    trainer_of(run, max_epochs=2).fit(toy_module(), ToyData(), ckpt_path=run / "checkpoints/last")
    trainer_of(tmp_path / "whole", max_epochs=2).fit(toy_module(), ToyData())
    assert losses(run) == losses(tmp_path / "whole")


def test_resume_from_an_older_checkpoint_cuts_the_metrics_back(tmp_path: Path) -> None:
    options = {"every": 3, "max_steps": 12, "max_epochs": -1}
    trainer_of(tmp_path / "whole", **options).fit(toy_module(), ToyData())
    run = tmp_path / "run"
    with pytest.raises(InterruptedError):
        trainer_of(run, callbacks=[StopAt(8)], **options).fit(toy_module(), ToyData())
    assert max(losses(run)) == 8
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "trai')  # killed while writing
    trainer_of(run, **options).fit(toy_module(), ToyData(), ckpt_path=run / "checkpoints/last")
    assert losses(run) == losses(tmp_path / "whole")


def test_gradient_accumulation_takes_every_micro_batch(tmp_path: Path) -> None:
    """Two micro-batches of 50 are a batch of 100: float64, SGD."""
    options: dict[str, Any] = {"precision": "64-true", "max_epochs": 1}
    rules = (SGD(0.1), SGD(0.1))
    whole, halves = toy_module(toy_dlrm, *rules), toy_module(toy_dlrm, *rules)

    class Halves(ToyData):
        def train_dataloader(self) -> ToyLoader:
            loader = ToyLoader("train", 100)
            loader.batches = [half for batch in loader.batches for half in split_in_two(batch)]
            return loader

    trainer_of(tmp_path / "whole", **options).fit(whole, ToyData(100))
    trainer_of(tmp_path / "halves", accumulate_grad_batches=2, **options).fit(halves, Halves(100))
    assert list(losses(tmp_path / "halves").values()) == pytest.approx(
        list(losses(tmp_path / "whole").values()), rel=1e-12
    )
    for a, b in zip(whole.network.parameters(), halves.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_short_step_at_an_epochs_end_is_a_mean_too(tmp_path: Path) -> None:
    """14 batches, 4 a step: the last step has 2."""
    module = toy_module(toy_dlrm, SGD(0.1), SGD(0.1))
    trainer_of(tmp_path / "run", precision="64-true", accumulate_grad_batches=4).fit(module, ToyData())
    plain = toy_dlrm(toy_schema().features, 3).double()
    optimizer = optimizer_of(plain, SGD(0.1), SGD(0.1))
    batches = ToyLoader("train", 50).batches
    for start in range(0, 14, 4):
        optimizer.zero_grad()
        for batch in batches[start : start + 4]:
            logits = plain(batch.dense.double(), batch.ids)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.label.double())
            (loss / len(batches[start : start + 4])).backward()
        optimizer.step()
    for a, b in zip(module.network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stop", [2, 5])
def test_resume_with_accumulation(stop: int, tmp_path: Path) -> None:
    options = {"every": 1, "max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 4}
    trainer_of(tmp_path / "whole", **options).fit(toy_module(), ToyData())
    run = tmp_path / "run"
    with pytest.raises(InterruptedError):
        trainer_of(run, callbacks=[StopAt(stop)], **options).fit(toy_module(), ToyData())
    trainer_of(run, **options).fit(toy_module(), ToyData(), ckpt_path=newest_checkpoint(run / "checkpoints"))
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2, "val_check_interval": 3},
        {"accumulate_grad_batches": 4, "val_check_interval": 4, "check_val_every_n_epoch": None},
    ],
)
def test_a_validation_between_micro_batches_is_refused(options: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="validate between steps"):
        trainer_of(tmp_path / "run", **options).fit(toy_module(), ToyData())


def test_other_rates_on_resume_are_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path / "run", max_steps=2).fit(toy_module(), ToyData())
    other = toy_module(table_rule=RowWiseAdagrad(0.3))
    with pytest.raises(UserError, match=r"learning_rate 0\.1.*learning_rate 0\.3"):
        trainer_of(tmp_path / "other").fit(other, ToyData(), ckpt_path=tmp_path / "run/checkpoints/last")


def test_settings_of_a_yaml_and_of_python_are_the_same_on_resume(tmp_path: Path) -> None:
    for steps, betas in ((2, (0.9, 0.99)), (4, [0.9, 0.99])):
        last = tmp_path / "run/checkpoints/last"
        module = toy_module(dense=partial(torch.optim.Adam, lr=0.05, betas=betas))
        trainer_of(tmp_path / "run", max_steps=steps).fit(module, ToyData(), ckpt_path=last if last.exists() else None)
    assert max(losses(tmp_path / "run")) == 4


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    trainer_of(run, max_steps=2).fit(toy_module(), ToyData())
    shutil.copytree(run / "checkpoints/best", run / "checkpoints/whole")  # best shares its files with last
    shutil.rmtree(run / "checkpoints/best")
    (run / "checkpoints/whole").rename(run / "checkpoints/best")
    rest = run / "checkpoints/last/rest.pt"
    rest.write_bytes(rest.read_bytes()[:-9])
    assert newest_checkpoint(run / "checkpoints") == run / "checkpoints/best"
    assert "skipping a damaged" in caplog.text and "rest.pt" in caplog.text


def split_in_two(batch: Any) -> list[Any]:
    half = len(batch) // 2
    return [
        type(batch)(
            label=batch.label[part],
            dense=batch.dense[part],
            ids=type(batch.ids)(values=batch.ids.values[part], tables=batch.ids.tables),
            global_size=half,
        )
        for part in (slice(0, half), slice(half, None))
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 9, "max_epochs": -1, "log_every_n_steps": 5},
        {"val_check_interval": 5},
        {"max_epochs": 3, "check_val_every_n_epoch": 2, "every": 14},
    ],
    ids=str,
)
def test_every_fit_ends_with_one_validation(options: dict, tmp_path: Path) -> None:
    module = toy_module()
    trainer_of(tmp_path / "run", **options).fit(module, ToyData())
    last = max(losses(tmp_path / "run"))
    validated = [line for line in lines(tmp_path / "run") if "validation/auc" in line]
    assert validated[-1]["step"] == last
    assert len({line["step"] for line in validated}) == len(validated)
    assert "train/loss" in validated[-1], "the last step is logged"

    batches = ToyLoader("validation", 50).batches
    with torch.no_grad():
        logits = torch.cat([module.network(b.dense, b.ids) for b in batches])
    expected = click_metrics(logits, torch.cat([b.label for b in batches]))
    assert {name: validated[-1][f"validation/{name}"] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_run_folder_tells_the_whole_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer_of(run, val_check_interval=5).fit(toy_module(), ToyData())
    steps = [line["step"] for line in lines(run)]
    assert steps == sorted(set(steps)), "one line a step"
    assert [line["samples"] for line in lines(run)] == [50 * step for step in steps]
    summary = json.loads((run / "summary.json").read_text())
    final = summary["final"]
    assert final["step"] == 14 and final["samples"] == 700
    assert final["parameters/tables"] == 4 * 1108
    assert final["parameters/total"] == final["parameters/tables"] + final["parameters/dense"]
    assert final["parallel/ranks"] == 1 and final["parallel/rows_per_rank"] == 1108
    # Four float32 and one accumulator a row.
    assert final["parallel/bytes_per_rank"] == 20 * 1108
    assert final["speed/samples_per_s"] > 0
    assert final["memory/peak_bytes"] > 1 << 26
    assert final["data_fingerprint"] == toy_schema().data_fingerprint and final["protocol"] == "toy"
    assert final["validation/auc"] == lines(run)[-1]["validation/auc"]
    best = max((line for line in lines(run) if "validation/auc" in line), key=lambda line: line["validation/auc"])
    assert summary["best"]["validation/auc"] == best["validation/auc"]
    assert summary["best"]["step"] == best["step"]


def test_training_metrics_are_those_of_the_samples_so_far(tmp_path: Path) -> None:
    module = toy_module()
    trainer_of(tmp_path / "run", max_steps=1).fit(module, ToyData())
    batch = ToyLoader("train", 50).batches[0]
    network = toy_module().make_network(toy_schema().features, module.seed)
    with torch.no_grad():
        expected = click_metrics(network(batch.dense, batch.ids), batch.label)
    (line,) = lines(tmp_path / "run")
    for name in ("auc", "accuracy", "log_loss"):
        assert line[f"train/{name}"] == pytest.approx(expected[name], abs=1e-7)
    assert line["train/log_loss"] == pytest.approx(line["train/loss"], abs=1e-7)


def test_training_seconds_go_on_where_a_run_is_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(InterruptedError):
        trainer_of(run, every=5, callbacks=[StopAt(11)]).fit(toy_module(), ToyData())
    before = {line["step"]: line["speed/training_s"] for line in lines(run)}
    trainer_of(run, every=5).fit(toy_module(), ToyData(), ckpt_path=newest_checkpoint(run / "checkpoints"))
    seconds = [line["speed/training_s"] for line in lines(run)]
    assert seconds == sorted(seconds) and seconds[10] > before[10] > 0


def test_best_checkpoint_gives_its_score_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer_of(run, val_check_interval=5).fit(toy_module(), ToyData())
    module = toy_module(seed=99)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[EvaluationWriter(RunFolder(run))],
        plugins=[FolderCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.validate(module, ToyData(), ckpt_path=run / "checkpoints/best", verbose=False)
    best = json.loads((run / "summary.json").read_text())["best"]
    found = json.loads((run / "validate.json").read_text())
    assert found == pytest.approx({k: v for k, v in best.items() if k != "step"}, rel=1e-12)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_precisions_train(precision: str, tmp_path: Path) -> None:
    module = toy_module()
    trainer_of(tmp_path / "run", precision=precision, max_epochs=3, gradient_clip_val=1.0).fit(module, ToyData())
    dtype = torch.float64 if precision == "64-true" else torch.float32
    assert [lookup.weight.dtype for lookup in module.network.lookups()] == [dtype]
    found = list(losses(tmp_path / "run").values())
    assert sum(found[-5:]) < sum(found[:5])


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (lambda: toy_module(toy_dcn), ToyData, "holds the model DLRM, but this run trains DCN"),
        (
            lambda: toy_module(
                lambda f, s: toy_dlrm.__globals__["DLRM"](f, s, embedding_dim=4, bottom_mlp=[9, 4], top_mlp=[8])
            ),
            ToyData,
            "is of another model: network.bottom",
        ),
        (
            lambda: toy_module(schema=toy_schema(protocol="other")),
            lambda: ToyData(schema=toy_schema(protocol="other")),
            "with another encoding",
        ),
    ],
    ids=["network", "width", "encoding"],
)
def test_checkpoint_of_something_else_is_refused(module: Any, data: Any, message: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer_of(run, max_steps=2).fit(toy_module(), ToyData())
    with pytest.raises(UserError, match=message):
        trainer_of(tmp_path / "other").fit(module(), data(), ckpt_path=run / "checkpoints/last")

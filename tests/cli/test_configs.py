"""Contract: every shipped configuration opens with what it needs and builds; mistakes in one are named."""

import json
import re
from pathlib import Path

import pytest
import yaml

from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.configs import replaced_settings
from lightning_dlrm.cli.parser import build_model_parser, parse
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.shipped import shipped_configs, shipped_names
from lightning_dlrm.engine.retired import update_options
from tests.raw_criteo import generated_lines, written

OVERLAYS = (
    "small.yaml",
    "own_data.yaml",
    "own_data_linear.yaml",
    "figure5/small.yaml",
    "criteo_kaggle.yaml",
    "criteo_terabyte.yaml",
)
NO_FITS = ("figure5.yaml", "own_data_models.yaml", "recipes.yaml")
SCHEMAS = [name for name in shipped_names() if name.startswith("datasets/")]
NAMES = [name for name in shipped_names() if name not in SCHEMAS]
MODELS = [name for name in NAMES if name not in (*OVERLAYS, *NO_FITS)]


@pytest.mark.parametrize("name", [*NAMES, *SCHEMAS])
def test_it_opens_with_what_it_needs(name: str) -> None:
    header = (shipped_configs() / name).read_text().split("\n\n")[0]
    for word in ("Needs:", "Run:", "Expect:"):
        assert f"# {word}" in header
    assert name in header.split("Run:")[1]


def test_scores_in_headers_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/scores.md").read_text()
    scores = re.findall(r"^\| `(\w+)`.*? \| ([\d.]+) \| ([\d.]+)% \| ([\d.]+) \| ([\d.]+)% \|$", page, re.MULTILINE)
    headers = {name: (shipped_configs() / f"{name}.yaml").read_text() for name, *_ in scores}
    found = {name: re.search(r"(\d+)% \(seed 1\) and (\d+)% \(seed 2\)", text) for name, text in headers.items()}
    named = {name: match.groups() for name, match in found.items() if match}
    assert len(named) >= 10 and len(named) == sum("(seed 1)" in text for text in headers.values())
    for name, *numbers in scores:
        first, share, second, other_share = map(float, numbers)
        for auc, percent in ((first, share), (second, other_share)):
            assert percent == pytest.approx(100 * (auc - 0.5) / (0.7977 - 0.5), abs=0.1)
        if name in named:
            assert [int(percent) for percent in named[name]] == [round(share), round(other_share)], name


def test_no_warm_up_depends_on_the_number_of_rows() -> None:
    """A warm-up in steps takes all of a fit on few rows, and none of one on many."""
    for name in NAMES:
        given = yaml.safe_load((shipped_configs() / name).read_text())
        schedule = given.get("model", {}).get("schedule", {}).get("init_args", {})
        assert schedule.get("warmup_steps") is None and schedule.get("warmup_share", 0) <= 0.2, name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if "logistic" in name else pytest.mark.slow)
        for name in NAMES
        if name.startswith("recipes/")
    ],
)
def test_a_recipe_trains_as_its_header_says(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On few rows, the commands of the header, with all their options, make a dataset, a fit and a test.

    The fit says how many ids are unknown, rare and missing; fit and test say how far a published score is.
    """
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "train.txt", generated_lines(700))
    header = (shipped_configs() / name).read_text().split("\n\n")[0].replace("\\\n#", "")
    commands = [found.split() for found in re.findall(r"-m lightning_dlrm (.*)", header)]
    assert [words[0] for words in commands] == ["preprocess", "fit", "test"]
    commands[1] += ["--published", '[{"metric": "auc", "value": 0.76, "source": "a paper"}]']
    for words in commands:
        assert main(words) == 0, words
    assert (tmp_path / "RUN/test.json").exists()
    told = capsys.readouterr().out
    assert "fit --config recipes/dlrm_small.yaml --data.path DIR" in told, "preprocess names a recipe"
    assert told.count("the published 0.76 (a paper") == 2
    assert "ids of unknown, rare and missing values: train" in caplog.text
    assert "batches of 88" not in caplog.text, "a warning counts whole batches, not the last one of the 600 rows"


@pytest.mark.parametrize("name", MODELS)
def test_it_builds(name: str, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--config", name, "--data.class_path", "Criteo", "--data.path", "demo", "--json"]
    assert main(["params", *arguments]) == 0
    size = json.loads(capsys.readouterr().out)
    assert size["total"] == size["tables"] + size["dense"]
    header = (shipped_configs() / name).read_text().split("\n\n")[0]
    for count in re.findall(r"(\d{3}) million parameters", header):
        assert round(size["total"] / 1e6) == int(count)
    for count in re.findall(r"([\d,]{9,}) parameters", header):
        assert f"{size['total']:,}" == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.table_optimizer", "torch.optim.Adam"], "Adam is not a class of this project, and cannot"),
        (["--model.wide_optimizer", "Ftrl"], "takes no class Ftrl; it takes SGD, Adagrad, RowWiseAdagrad, Adam"),
        (["--model.loss", "torch.nn.BCELoss"], "BCELoss is not a class of this project; choose one of LogLoss"),
        (["--model.loss", "FocalLoss", "--model.loss.gamma", "-1"], "gamma is -1.0"),
        (["--model.network.tables.pooling", "max"], "pooling: max is not one of sum, mean"),
        (["--model.network.tables.dims", "{C3: 8}"], "C3 has the width 8 and embedding_dim is 16: make"),
        (
            ["--model.network.tables.quotient_remainder", "{collisions: 4, operation: xor}"],
            "operation: xor is not one of mult, add, concat",
        ),
        (["--model.network.tables.quotient_remainder.collisions", "0"], "collisions is 0"),
        (["--model.network.interaction", "cross"], "interaction: cross needs cross"),
        (["--model.network.embedding_dim", "8"], "ends in 16 but embedding_dim is 8"),
        (["--wandb.tags", "night"], "wandb.tags: night is not a list; write [night]"),
        (["--model.averaging.decay", "much"], "model.averaging.decay is much; expected a number"),
        (["--model.averaging.decay", "3"], "averaging.decay is 3.0; expected 0 to 1"),
        (["--batch_size", "10"], "unknown option --batch_size; did you mean --data.batch_size?"),
        (["--model.table_optimizer.lr", "3"], "did you mean --model.table_optimizer.learning_rate?"),
        (["--data.folder", "x"], "unknown option --data.folder; did you mean --data.path?"),
        (["--model.network.on_host", "x"], "did you mean --model.network.tables.on_host?"),
        (["--model.compile", "maybe"], "maybe is not one of true, false, default, reduce-overhead, max-autotune"),
        (["--trainer.callbacks", "EarlyStoping"], "did you mean EarlyStopping? It takes ReduceOnPlateau, "),
        (["--trainer.logger", "x"], "error: --trainer.logger takes no class x; it takes CometLogger, "),
        (["--model.network.bottom_mlp", "[]"], "this dataset has 13 dense columns: end bottom_mlp in 16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["params", "--config", "dlrm.yaml", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stop_at_auc", "much"], "error: --stop_at_auc is much; expected a number"),
        (["--resume", "yes"], "error: --resume is yes; expected auto"),
        (["--published", "foo"], "published is foo; expected a list of metric, value and source, such as [{"),
    ],
)
def test_what_does_not_fit_a_run_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--config", "dlrm.yaml", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_an_overlay_without_a_model_is_one_line_that_says_so(capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--config", "own_data_linear.yaml", "--data.path", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: unknown option --data.path: no class that has this key is chosen; a file that holds changes"
    )
    assert "needs a model's YAML before it" in error and len(error.strip().splitlines()) == 1


def test_a_time_that_yaml_reads_as_a_number_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    overlay = tmp_path / "time.yaml"
    overlay.write_text("trainer:\n  max_time: 1:00:00:00\n")
    assert main(["fit", "--config", "dlrm.yaml", "--config", str(overlay)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        'trainer.max_time is 216000; expected days:hours:minutes:seconds in quotes, such as "00:01:30:00"'
    )


def test_kernels_of_an_earlier_release_become_auto() -> None:
    new, notes = update_options(["--model.kernels", "fbgemm"])
    assert new == ["--model.kernels=auto"] and "fbgemm of model.kernels was removed: auto is used" in notes[0]


def test_arms_of_a_comparison_keep_the_options_of_callbacks() -> None:
    options = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=validation/auc"]
    parser = build_model_parser("params")
    settings = parse(parser, ["--config", "dlrm.yaml", *options])
    (callback,) = settings.trainer.callbacks
    assert callback.init_args.monitor == "validation/auc"


def test_a_later_configuration_that_replaces_settings_is_named(tmp_path: Path) -> None:
    (said,) = replaced_settings(["--config", "own_data.yaml", "--config", "dlrm.yaml"])
    assert said.startswith("dlrm.yaml replaces data.class_path Clicks, model.table_optimizer.class_path Adagrad and ")
    assert said.endswith(
        "more settings of own_data.yaml, because it comes later: if that is not meant, give --config dlrm.yaml before "
        "--config own_data.yaml"
    )
    (said,) = replaced_settings(["--config=dlrm.yaml", "--config=dcn.yaml"])
    assert said.startswith("dcn.yaml replaces model.network.class_path DLRM of dlrm.yaml, because it comes later: if ")
    (said,) = replaced_settings(["--config", "small.yaml", "--config", "dlrm.yaml"])
    assert said.startswith(
        "dlrm.yaml replaces model.schedule.init_args.decay_share 0.25, trainer.val_check_interval 100 and "
        "trainer.log_every_n_steps 10 of small.yaml, because"
    )
    for right in (["dlrm", "own_data", "small"], ["small", "dlrm", "small"], ["dlrm", "dlrm"]):
        assert replaced_settings([f"--config={name}.yaml" for name in right]) == []
    overlay = tmp_path / "mine.yaml"
    for text in ("trainer: {max_epochs: 3}", "model: {schedule: {class_path: Cosine, init_args: {warmup_share: 0.2}}}"):
        overlay.write_text(text)
        with pytest.raises(UserError, match=r"dlrm\.yaml replaces all settings of .*: give --config dlrm"):
            replaced_settings(["--config", str(overlay), "--config", "dlrm.yaml"])


@pytest.mark.parametrize(("wrong", "found"), [("[DLRM]", "['DLRM']"), ("5", "5")])
def test_a_class_that_is_no_name_is_refused(
    wrong: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(f"model:\n  network:\n    class_path: {wrong}\n")
    assert main(["fit", "--config", "dlrm.yaml", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"bad.yaml: model.network.class_path is {found}; expected the name of a class, such as DLRM" in said

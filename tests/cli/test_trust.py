"""Contract: a configuration imports and builds only classes that the user trusts; whatever else it names stays text."""

import functools
import inspect
import shlex
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.classes import KNOWN_CLASSES
from lightning_dlrm.cli.parser import (
    CheckpointSettings,
    CommandParser,
    WandbSettings,
    build_trainer_parser,
    parse,
)
from lightning_dlrm.cli.trust import take_trust, trust_options
from lightning_dlrm.compare.runs import read_run
from lightning_dlrm.compare.scores import predict_command
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.module import CTRModule
from tests.caches import new_cache
from tests.front_door.conftest import TINY

OWN = """\
import pathlib, typing, pytorch_lightning as pl, torch
class Keeper(pl.Callback):
    def __init__(self, anything: typing.Any = None, table: dict | None = None, rate: float = 1.0):
        self.anything, self.table = anything, table
class Interrupt(pl.Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 8 and not pathlib.Path("interrupted").exists():
            pathlib.Path("interrupted").touch()
            raise KeyboardInterrupt
def rate(step): return 1.0
load = torch.load
"""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module ``own`` in the current folder, and a module ``stranger`` elsewhere that leaves a mark when imported."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere, here / "run"):
        folder.mkdir()
    (elsewhere / "stranger.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Evil: pass\n")
    (here / "own.py").write_text(OWN)
    (here / "run/metrics.jsonl").touch()
    monkeypatch.chdir(here)
    for path in (here, elsewhere):
        monkeypatch.syspath_prepend(path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    take_trust([])


@functools.cache
def parser() -> CommandParser:
    return build_trainer_parser("fit")


def parsed(*options: str) -> Any:
    return parse(parser(), take_trust(["--config", "dlrm.yaml", *options]))


def refused(*options: str) -> str:
    with pytest.raises(UserError) as error:
        parsed(*options)
    assert "\n" not in str(error.value)
    return str(error.value)


def written(text: str, path: str = "mine.yaml") -> str:
    Path(path).write_text(text)
    return f"--config={path}"


NAMED = {
    "model": "network: {class_path: X}",
    "model by name": "network: X",
    "loss": "loss: X",
    "update rule": "table_optimizer: {class_path: X, init_args: {learning_rate: 1}}",
    "optimizer": "dense_optimizer: X",
    "schedule": "schedule: {class_path: X}",
    "function": "schedule: {class_path: torch.optim.lr_scheduler.LambdaLR, init_args: {lr_lambda: X}}",
    "in a list of functions": "schedule: {class_path: torch.optim.lr_scheduler.LambdaLR, init_args: {lr_lambda: [X]}}",
    "callback": "callbacks: {class_path: X}",
    "callback by name": "callbacks: X",
    "in a list": "callbacks: [EarlyStopping, {class_path: X}]",
    "in a list by name": "callbacks: [X]",
    "logger": "logger: {class_path: X}",
    "profiler": "profiler: X",
    "strategy": "strategy: X",
    "accelerator": "accelerator: X",
    "plugin": "plugins: [{class_path: X}]",
    "Any": "strategy: {class_path: DDPStrategy, init_args: {ddp_comm_state: {class_path: X}}}",
    "Callable": "strategy: {class_path: DDPStrategy, init_args: {ddp_comm_hook: X}}",
    "dict": "callbacks: {class_path: RichProgressBar, init_args: {console_kwargs: {a: [{class_path: X}]}}}",
    "text in a dict": "callbacks: {class_path: RichProgressBar, init_args: {console_kwargs: {a: '{class_path: X}'}}}",
    "dict_kwargs": "callbacks: {class_path: ModelCheckpoint, dict_kwargs: {a: {class_path: X}}}",
    "data": "data: {class_path: X}",
    "checkpoint": "ckpt_path: {class_path: X, init_args: {args: touch imported, shell: true}}",
    "weights_only": "weights_only: {class_path: X}",
    "unknown key": "no_such_key: {class_path: X}",
    "full key": "trainer.callbacks.class_path: X",
}
"""Where a configuration can name a class: place -> a setting of the model or the Trainer, or at the top."""


def document(setting: str) -> str:
    key = setting.partition(":")[0]
    if key in ("network", "loss", "table_optimizer", "dense_optimizer", "schedule"):
        return f"model: {{{setting}}}"
    at_top = ("data", "ckpt_path", "weights_only", "no_such_key", "trainer.callbacks.class_path")
    return setting if key in at_top else f"trainer: {{{setting}}}"


@pytest.mark.parametrize("place", NAMED)
def test_a_class_of_a_stranger_is_refused_and_not_imported(place: str, tmp_path: Path) -> None:
    message = refused(written(document(NAMED[place].replace("X", "stranger.Evil"))))
    assert "stranger.Evil is not imported" in message and "add --trust stranger" in message
    assert not (tmp_path / "imported").exists() and "stranger" not in sys.modules


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.callbacks+=stranger.Evil"],
        ["--trainer.callbacks.class_path", "stranger.Evil"],
        ["--model.network", "{class_path: stranger.Evil}"],
        ["--model.network.help", "stranger.Evil"],
        ["--data", "stranger.Evil"],
        ["--trainer.profiler=stranger.Evil"],
        ["--trainer.callbacks", "section.yaml"],
        ["--trainer", "sections.yaml"],
        ["-cnamed.yaml"],
        ["--trainer.callbacks", "lightning_dlrm.compare.processes.subprocess.Popen"],
    ],
    ids=lambda options: options[0],
)
def test_a_class_of_a_stranger_in_an_option_is_refused(options: list[str], tmp_path: Path) -> None:
    # Options take files too.
    Path("section.yaml").write_text("class_path: stranger.Evil")
    Path("sections.yaml").write_text("callbacks: [{class_path: stranger.Evil}]")
    Path("named.yaml").write_text("trainer: {callbacks: [stranger.Evil]}")
    assert "is not imported" in refused(*options)
    assert not (tmp_path / "imported").exists() and "stranger" not in sys.modules


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("function", "torch.load"),
        ("function", "torch.hub.load"),
        ("in a list of functions", "torch.ops.load_library"),
        ("function", "{class_path: torch.nn.Linear, init_args: {in_features: 1, out_features: 1}}"),
        ("function", "own.load"),
        ("function", "own.torch.nn"),
        ("function", "torch.os.system"),
        ("Callable", "torch.utils.cpp_extension.load"),
        ("Callable", "{class_path: torch.nn.ReLU}"),
        ("Any", "torch.nn.ReLU"),
        ("Any", "pytorch_lightning.Callback"),
        ("dict", "torch.nn.ReLU"),
        ("callback", "torch.hub.load"),
        ("callback", "pytorch_lightning.LightningModule"),
        ("plugin", "torch.nn.ReLU"),
        ("model", "torch.nn.ReLU"),
        ("optimizer", "torch.hub.load"),
        ("optimizer", "pytorch_lightning.utilities.memory.garbage_collection_cuda"),
        ("loss", "torch.nn.BCELoss"),
        ("data", "torch.utils.data.DataLoader"),
    ],
)
def test_of_trusted_packages_only_what_options_declare_is_built(place: str, name: str) -> None:
    refused(written(document(NAMED[place].replace("X", name))))


def test_values_without_a_type_stay_data() -> None:
    spec = "{class_path: Timer, init_args: {duration: {hours: 1}}}"
    full = spec.replace("Timer", "pytorch_lightning.callbacks.Timer")
    options = f"{{anything: {full}, table: {{inner: [{full}]}}}}"
    settings = parsed(written(f"trainer: {{callbacks: [{{class_path: own.Keeper, init_args: {options}}}, {spec}]}}"))
    keeper, timer = parser().build(settings).trainer.callbacks
    assert type(timer).__name__ == "Timer"
    assert keeper.anything["class_path"] == keeper.table["inner"][0]["class_path"] == full[len("{class_path: ") :][:33]


def test_arguments_of_a_class_may_have_the_names_of_options() -> None:
    text = "trainer: {callbacks: [{class_path: own.Keeper, init_args: {anything: {data: clicks.parquet}}}]}"
    assert parsed(written(text)).trainer.callbacks[0].init_args.anything == {"data": "clicks.parquet"}


def test_own_modules_count_in_the_user_s_configurations_and_not_in_those_of_runs(tmp_path: Path) -> None:
    schedule = "{class_path: LambdaLR, init_args: {lr_lambda: own.rate}}"
    text = f"trainer: {{callbacks: [own.Keeper]}}\nmodel: {{schedule: {schedule}}}"
    assert parsed(written(text)).trainer.callbacks[0].class_path == "own.Keeper"
    assert trust_options() == ["--trust", "own"]
    Path("run/checkpoints/last").mkdir(parents=True)
    for name in ("manifest.json", "rest.pt"):
        Path("run/checkpoints/last", name).touch()
    for inside in ("run/config.yaml", "run/checkpoints/last/config.yaml"):
        assert "--trust own" in refused(written(text, inside))
        parsed("--trust", "own", written(text, inside))
    assert trust_options() == ["--trust", "own"]
    # The next command starts without it.
    assert "--trust own" in refused(written(text, "run/config.yaml"))
    # Named by the user's own option.
    parsed("--trainer.callbacks=own.Keeper", written(text, "run/config.yaml"))
    sys.modules.pop("own")
    (tmp_path / "elsewhere/own.py").write_text("raise SystemExit")
    sys.path.insert(0, str(tmp_path / "elsewhere"))
    assert "--trust own" in refused(written(text)), "another module of this name would be imported"


def test_trust_is_never_read_from_a_file() -> None:
    text = "trust: [stranger]\ntrainer: {callbacks: [stranger.Evil]}"
    assert "trust is an option of the command line" in refused(written(text))
    assert "config is an option of the command line" in refused(written("config: other.yaml"))
    for wrong in ("", "*", "a b", "jsonargparse", "../x"):
        with pytest.raises(UserError, match="expected the name of a module"):
            take_trust(["--trust", wrong])
    with pytest.raises(UserError, match="--trust nowhere: there is no such module"):
        take_trust(["--trust", "nowhere"])
    assert take_trust(["--x", "--trust=json.tool", "y"]) == ["--x", "y"]
    assert trust_options() == ["--trust", "json.tool"]


def test_classes_that_do_not_exist_are_not_called_unfit() -> None:
    Path("own.py").write_text("class Foo: pass")
    for key in ("model.network", "model.loss", "model.schedule", "model.table_optimizer", "data", "trainer.logger"):
        assert refused(f"--{key}=own.Nope") == f"{key}: there is no own.Nope; its classes are Foo"
        assert (
            refused(f"--{key}=torch.optim.Adagard")
            == f"{key}: there is no torch.optim.Adagard; did you mean torch.optim.Adagrad?"
        )
        assert "there is no module nowhere for nowhere.Nope" in refused(f"--{key}=nowhere.Nope")
    assert refused("--model.network=own.Fooo") == "model.network: there is no own.Fooo; did you mean own.Foo?"
    for key in ("model.network", "model.loss", "model.schedule", "data", "trainer.logger"):
        assert f"{key}: own.Foo is " in refused(f"--{key}=own.Foo")
    assert "there is no own.Nope" in refused("--trainer.callbacks=[{class_path: own.Nope}]")
    unfit = "own.Foo is not a subclass of Callback; derive your class from Callback"
    assert unfit in refused("--trainer.callbacks=[{class_path: own.Foo}]")


@pytest.mark.parametrize("command", ["fit", "validate", "params", "plan", "compare", "checkpoint import"])
def test_every_command_that_reads_configurations_refuses(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}}, "model.pt")
    written("trainer: {callbacks: [{class_path: stranger.Evil}]}")
    configs = ["--config", "figure5.yaml" if command == "compare" else "dlrm.yaml", "--config", "mine.yaml"]
    more = {"checkpoint import": ["model.pt", *configs, "--output", "out"], "compare": [*configs, "--dry-run"]}
    assert main([*command.split(), *more.get(command, configs)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: mine.yaml: stranger.Evil is not imported")
    assert not (tmp_path / "imported").exists() and not Path("out").exists()


def test_an_interrupted_fit_prints_what_it_trusts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", new_cache(tmp_path_factory.getbasetemp() / "cache"))
    written(TINY + "wandb: {mode: disabled}\n")
    tiny = [
        "--config=dlrm.yaml",
        "--config=mine.yaml",
        "--run_dir=made",
        "--trainer.max_steps=10",
        "--model.kernels=plain",
    ]
    with pytest.raises(SystemExit):
        main(["fit", *tiny, "--trainer.callbacks=own.Interrupt"])
    (said,) = [record.getMessage() for record in caplog.records if "continue with:" in record.getMessage()]
    _, *again = shlex.split(said.partition("python -m ")[2])
    assert again[-2:] == ["--trust", "own"]
    assert main(again[:-2]) == 2
    assert main(again) == 0


def test_the_command_that_ends_an_unfinished_run_names_what_is_trusted() -> None:
    Path("run/config.yaml").write_text("{seed_everything: 1, model: {}, data: {}, trainer: {}, wandb: {}}")
    take_trust(["--trust", "own"])
    with pytest.raises(UserError, match=r"end it with: .* --resume auto --trust own$"):
        read_run(Path("run"))


def test_the_runs_of_a_comparison_build_no_callbacks_loggers_and_profilers() -> None:
    text = "trainer: {callbacks: [Timer], logger: {class_path: CSVLogger, init_args: {save_dir: x}}, profiler: simple}"
    options = predict_command(Path("run"), "test", Path("scores"))
    settings = parsed(written(text), *options[options.index("--trainer.strategy") :]).trainer
    assert (settings.callbacks, settings.logger, settings.profiler) == (None, False, None)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("model.table_optimizer.learning_rate", "null", "learning_rate is null; expected a number"),
        ("model.network.embedding_dim", "null", "embedding_dim is null; expected a whole number"),
        ("data.demo", "[null]", "demo is [null]; expected keys with values"),
        ("data.batch_size", "null", "batch_size is null; expected a whole number"),
        ("data.demo.train_rows", "null", "train_rows"),
        ("trainer.max_steps", "null", "max_steps"),
        ("log_norms", "null", "log_norms"),
        ("wandb.log_model", "null", "log_model"),
        ("trainer.callbacks", "[{class_path: own.Keeper, init_args: {rate: null}}]", "rate is null; expected"),
        ("trainer.callbacks", "[{class_path: own.Keeper, init_args: {table: null, anything: null}}]", None),
        ("model.dense_optimizer.weight_decay", "null", "weight_decay is null"),
        ("model.dense_optimizer.foreach", "null", None),
        ("model.network.top_mlp", f"[1{'0' * 400}]", "top_mlp: a number has more than 64 bits"),
    ],
)
def test_null_where_no_none_is_taken_and_numbers_beyond_64_bits(option: str, value: str, said: str | None) -> None:
    if said is None:
        parsed(f"--{option}={value}")
    else:
        assert said in refused(f"--{option}={value}")


DOUBLING = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 25))
"""Aliases that stand for 2^25 values."""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {max_steps: 3}\ntrainer: {max_epochs: 2}", "mine.yaml: the key trainer occurs twice"),
        ("trainer:\n  max_steps: 3\n  max_steps: 4", "mine.yaml: the key max_steps occurs twice, again in line 3"),
        ("trainer: {callbacks: [{class_path: Timer, class_path: Timer}]}", "class_path occurs twice"),
        ("a: &a [*a]", "aliases make more"),
        (DOUBLING, "aliases make more"),
        ("trainer: !!python/object/apply:os.system ['touch imported']", "mine.yaml is not YAML"),
        ("trainer: {max_steps: !!timestamp x}", "mine.yaml is not YAML"),
        (f"trainer: {{max_steps: 1{'0' * 5000}}}", "mine.yaml is not YAML"),
        ("run_dir: ${oc.env:HOME}", None),
        ("trainer: null", "trainer is null; expected keys with values"),
        ("wandb: []", "wandb is []; expected keys with values"),
        ("model: &a {seed: 1}\ntrainer: {<<: *a, max_steps: 1}", "unknown key trainer.seed"),
    ],
)  # fmt: skip
def test_yaml_that_says_something_else_than_it_seems(text: str, said: str | None) -> None:
    if said is None:
        assert parsed(written(text)).run_dir == "${oc.env:HOME}"
    else:
        assert said in refused(written(text))


def test_yaml_in_options_and_configurations_at_addresses() -> None:
    assert "--trainer: the key max_steps occurs twice" in refused("--trainer", "{max_steps: 1, max_steps: 2}")
    assert "has a tag of YAML" in refused("--trainer.max_steps", "!!bool x")
    assert "not YAML" in refused("--model.dense_optimizer", "{lr: !!bool x}")
    for broken in ("{max_steps: !!bool x}", "1" * 5000):
        assert "expected keys with values" in refused("--trainer", broken)
    assert parsed("--wandb.name", "2020-13-45").wandb.name == "2020-13-45"
    Path("section.yaml").write_text("max_steps: 1\nmax_steps: 2")
    assert "the key max_steps occurs twice" in refused("--trainer", "section.yaml")
    for address in ("http://localhost:1/x.yaml", "memory://x.yaml"):
        assert "no configuration" in refused("--config", address)
        assert "expected keys with values" in refused("--trainer", address)


def test_home_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = "{class_path: CSVLogger, init_args: {save_dir: ~/logs}}"
    settings = parsed(
        written(f"run_dir: ~/run\ndata: {{init_args: {{path: ~/data}}}}\ntrainer: {{logger: [{logger}]}}")
    )
    assert settings.run_dir == str(tmp_path / "run") and settings.data.init_args.path == str(tmp_path / "data")
    assert settings.trainer.logger[0].init_args.save_dir == str(tmp_path / "logs")
    main(["checkpoint", "merge", "--output=~/merged", "~/none"])


def test_no_argument_of_ours_takes_any_value() -> None:
    ours = [kind for kind in KNOWN_CLASSES if not kind.__module__.startswith("torch")]
    for kind in (*ours, CTRModule, CheckpointSettings, WandbSettings):
        hints, parameters = typing.get_type_hints(kind.__init__), inspect.signature(kind).parameters
        for name, parameter in parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                assert not {Any, object} & _members(hints[name]), f"{kind.__name__}.{name}"


def _members(kind: Any) -> set[Any]:
    return {kind}.union(*(_members(inner) for inner in typing.get_args(kind) if not isinstance(inner, (list, str))))

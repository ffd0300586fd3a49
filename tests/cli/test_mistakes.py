"""Contract: each mistake in a command gets one clear line, ends it with exit code 2, and loses nothing."""

from pathlib import Path
from typing import Any

import pytest

from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.trainer_settings import _check_place
from lightning_dlrm.contracts.errors import UserError
from tests.cli.test_cli import FIT, QUICK, STOP_EARLY, TINY_DEMO, own_folders

__all__ = ["own_folders"]  # a fixture that every test uses


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--trainer.accumulate_grad_batches=3", "validate between steps"),
        ("--trainer.log_every_n_steps=0", "trainer.log_every_n_steps is 0; expected 1 or more"),
        ("--trainer.max_steps=-5", "trainer.max_steps is -5; expected 0 or more, or -1 for no limit"),
        ("--trainer.max_epochs=-3", "trainer.max_epochs is -3; expected 0 or more, or -1 for no limit"),
        ("--trainer.min_steps=-3", "trainer.min_steps is -3; expected 0 or more"),
        ("--trainer.num_nodes=0", "trainer.num_nodes is 0; expected a number of machines, 1 or more"),
        (
            "--trainer.val_check_interval=0",
            "trainer.val_check_interval is 0; expected a number of batches, above 0, or",
        ),
        ("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch is 0; expected 1 or more, or null to"),
        ("--trainer.limit_val_batches=-3", "limit_val_batches is -3; expected a number of batches, 0 or more, or a sh"),
        ("--trainer.limit_val_batches=1.5", "limit_val_batches is 1.5; expected a number of batches, 0 or more, or a"),
        ("--trainer.gradient_clip_algorithm=x", "trainer.gradient_clip_algorithm is x; expected one of norm, value"),
        ("--trainer.max_time=3", "trainer.max_time is 3; expected days:hours:minutes:seconds, such as 00:01:30:00"),
        ("--trainer.profiler=x", "trainer.profiler is x; expected one of simple, advanced, pytorch"),
        ("--stop_at_auc=0.3", "stop_at_auc is 0.3"),
        ("--stop_at_auc=0.8 --trainer.limit_val_batches=0", "trainer.limit_val_batches is 0"),
        ("--checkpoint.every_n_steps=-1", "checkpoint.every_n_steps is -1"),
        ("--trainer.callbacks=WeightAveraging", "set model.averaging.decay"),
        (f"{STOP_EARLY}validation/loss", "EarlyStopping's monitor is validation/loss; expected one of validation/auc"),
        (f"{STOP_EARLY}validation/calibration", "EarlyStopping's monitor is validation/calibration; expected one of"),
        (f"{STOP_EARLY}validation/group_auc --trainer.callbacks.mode=max", "no column is given to group by"),
        (f"{STOP_EARLY}validation/auc", "mode is min, but higher values of validation/auc (weight 1) are better"),
        (
            f"{STOP_EARLY}validation/log_loss --trainer.callbacks.mode=max",
            "mode is max, but lower values of validation/log_loss (weight 1) are better: set mode to min",
        ),
        (f"{STOP_EARLY}validation/log_loss --trainer.limit_val_batches=0", "trainer.limit_val_batches is 0"),
        (
            "--trainer.callbacks=ReduceOnPlateau",
            "ReduceOnPlateau sets the learning rates, and so does model.schedule WarmupThenDecay: leave one of them",
        ),
        (
            "--trainer.callbacks=ReduceOnPlateau --trainer.callbacks.monitor=validation/loss",
            "ReduceOnPlateau's monitor is validation/loss; expected one of validation/auc",
        ),
        (
            "--trainer.callbacks=ReduceOnPlateau --trainer.callbacks.mode=min",
            "mode is min, but higher values of validation/auc (weight 1) are better: set mode to max",
        ),
        (
            "--trainer.callbacks=ReduceOnPlateau "
            '--trainer.callbacks.monitor={"validation/auc":1.0,"validation/log_loss":0.5}',
            "of validation/log_loss (weight 0.5) are better: give it the weight -0.5",
        ),
        (f"{STOP_EARLY}validation/log_loss --trainer.callbacks.check_on_train_epoch_end=true", "epoch_end out"),
    ],
)
def test_a_failed_start_leaves_the_name_free(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, *QUICK, "--run_dir", "run", *option.split()]) == 2
    assert said in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "no command fitt; did you mean fit?"),
        (["fit", "--config", "dlmr.yaml"], "did you mean dlrm.yaml?"),
        (["fit", "--config", "dlrm"], "did you mean dlrm.yaml?"),
        (["fit", "--config", "figure5.yaml"], "lightning_dlrm compare --config figure5.yaml"),
        (
            ["fit", "--config", "dlrm.yaml", "--trainer.max_step", "3"],
            "--trainer.max_step; did you mean --trainer.max_steps?",
        ),
        (
            ["fit", "--config", "dlrm.yaml", "--model.network.embeding_dim", "3"],
            "did you mean --model.network.embedding_dim?",
        ),
        (["fit", "--config", "dlrm.yaml", "--data.pth", "x"], "did you mean --data.path?"),
        (
            ["fit", "--config", "dlrm.yaml", "--model.network", "DLMR"],
            "takes no class DLMR; did you mean DLRM? It takes D",
        ),
        (["fit", "--config", "dlrm.yaml", "--model.netwrok.embedding_dim", "3"], "mean --model.network.embedding_dim?"),
        (["fit", "--config", "small.yaml"], "begin with a model, as in --config dlrm.yaml --config OVERLAY"),
        (["fit", "small.yaml"], "did you mean --config small.yaml?"),
        (
            ["fit", "--config", "dlrm.yaml", "--seed_everything", "-3"],
            "error: --seed_everything is -3; give a number from 0",
        ),
        (["fit", "--config", "dlrm.yaml", "--seed_everything", str(2**32)], "seed_everything is 4294967296; give"),
        (
            ["fit", "--config", "dlrm.yaml", "--trainer.max_steps", "many"],
            "trainer.max_steps is many; expected a",
        ),
        (["fit", "--config", "dlrm.yaml", "--data.path", "nowhere"], "no dataset folder at nowhere"),
        (["fit", "--config", "dlrm.yaml", "--data.path", "."], "is not a dataset folder: it has no dataset.json"),
        (["fit", "--config", "dlrm.yaml", "--data.batch_size", "0"], "error: --data.batch_size is 0; give 1 or more"),
        (["fit", "--config", "dlrm.yaml", "--data.path="], "data.path is missing: give --data.path DIR, a folder made"),
        (
            ["fit", "--config", "dlrm.yaml", "--config", "own_data.yaml"],
            "data.path is missing: give --data.path DIR, a folder made by preprocess (demo data are for the class C",
        ),
        (
            ["fit", "--config", "dlrm.yaml", "--model.network.init_args.bottom_mlp", "512-256"],
            "error: --model.network.init_args.bottom_mlp: 512-256 is not a list; write [512, 256]",
        ),
        (["fit", "--config", "dlrm.yaml", "--model.network.top_mlp", "64"], "top_mlp: 64 is not a list; write [64]"),
        (["fit", "--config", "dlrm.yaml", "--model.network.top_mlp", "3.5"], "top_mlp is 3.5; expected a list of"),
        (["fit", "--config", "dlrm.yaml", "--model.network.embedding_dim", "0"], "embedding_dim is 0; expected 1 or"),
        (["fit", "--config", "dlrm.yaml", "--model.averaging", "3"], "averaging is 3; expected keys with values, whi"),
        (["fit", "--config", "dlrm.yaml", "--config"], "error: --config needs a value"),
        (["fit", "--config", "--run_dir", "x"], "error: --config needs a value: a YAML file, or the name of a"),
        (["fit", "--config="], "error: --config needs a value: a YAML file, or the name of a shipped one"),
        (["fit", "--config", "dlrm.yaml", "--data.path"], "error: --data.path needs a value"),
        (["fit", "--config", "dlrm.yaml", "--run_dir"], "error: --run_dir needs a value"),
        (
            ["plan", "--config", "dlrm.yaml", "--json=3"],
            "--json is given the value 3, but takes none: write --json alo",
        ),
        (["plan", "--config", "dlrm.yaml", "--json", "3"], "unknown argument 3; options begin with --"),
        (
            ["validate"],
            "validate needs a model and a checkpoint: give --config runs/NAME/config.yaml --ckpt_path runs/N",
        ),
        (["compare", "--config", "figure5.yaml", "--seeds", "x", "--output", "y"], "--seeds is x; expected whole numb"),
        (["fit", "--config", "dlrm.yaml", "--model.network.bottom_mlp", "[3,4]"], "ends in 4 but embedding_dim is 16"),
        (["fit", "--config", "dlrm.yaml", "--model.table_optimizer.learning_rate", "-1"], "learning_rate is -1"),
        (["fit", "--config", "dlrm.yaml", "--resume", "auto"], "give it with --run_dir"),
        (["fit", "--config", "dlrm.yaml", "--ckpt_path", "nowhere"], "checkpoint nowhere does not exist"),
        (["fit", "--config", "dlrm.yaml", "--config", "criteo_kaggle.yaml"], "reads 'kaggle'"),
        (["validate", "--config", "dlrm.yaml"], "validate needs a checkpoint"),
        (["test", "--config", "dlrm.yaml"], "test needs a checkpoint"),
        (["predict", "--config", "dlrm.yaml"], "predict needs a checkpoint"),
        (["params", "--config", "dlrm.yaml", "--data.path", "nowhere"], "no dataset folder at nowhere"),
        (["inspect", "nowhere"], "with 'python -m lightning_dlrm generate demo'"),
        (["fit", "--config", "dlrm.yaml", "--wandb.log_model", "maybe"], "log_model: maybe is not one of true, false"),
        (["fit", "--config", "dlrm.yaml", "--trainer.devices", "2"], "needs --trainer.strategy embedding_sharded_ddp"),
        (["fit", "--config", "dlrm.yaml", "--trainer.precision", "foo"], "trainer.precision: foo is not one of"),
        (
            ["fit", "--config", "dlrm.yaml", "--seed_everything", "abc"],
            "seed_everything is abc; expected a whole number, true",
        ),
        (["fit", "--config", "dlrm.yaml", "--trainer.precision", "16-mixed"], "use bf16-mixed"),
        (["fit", "--config", "dlrm.yaml", "--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val is -1"),
        (["fit", "--config", "dlrm.yaml", "--trainer.val_check_interval", "0.5"], "should be an integer"),
        (["fit", "--config", "dlrm.yaml", "--trainer.accelerator", "abacus"], "abacus; expected auto, cpu or gpu"),
        (["fit", "--config", "dlrm.yaml", "--trainer.strategy", "embeding_sharded"], "mean embedding_sharded_ddp?"),
        (["predict", "--ckpt_path", "runs/x/checkpoints/best"], "--config runs/x/config.yaml"),
        (["preprocess", "--schema", "nosuch.yaml", "--input", "x", "--output", "y"], "shipped are datasets/avazu.yaml"),
        (["bench", "stpe"], "bench has no command stpe; did you mean step? The commands are lookup, step"),
        (["checkpoint", "inf"], "checkpoint has no command inf; did you mean info?"),
        (["generate", "x"], "generate has no kind x; the kinds are demo, random, trace, tsv, log"),
        (["preprocess", "--dataset", "kagle", "--input", "x"], "--dataset is kagle; did you mean kaggle?"),
        (["params", "--config", "dlrm.yaml", "--ckpt_path", "x"], "params opens no checkpoint: leave --ckpt_path out"),
        (["--config", "dlrm.yaml", "fit"], "--config comes before the command; write the command first, such as fit"),
        (["fit", "-config", "dlrm.yaml"], "unknown option -config; options begin with two dashes: --config"),
        (["fit", "--config", "dlrm.yaml", "extra"], "unknown argument extra; options begin with --, and --help lists"),
        (["fit", "--config", "dlrm.yaml", "--wandb", "false"], "error: --wandb is false; expected keys with values"),
        (
            ["fit", "--config", "dlrm.yaml", "--trainer.callbacks", "EarlyStopping"],
            "--trainer.callbacks: EarlyStopping needs monitor: give --trainer.callbacks.monitor, or in a YAML file in",
        ),
        (["plan", "--config", "dlrm.yaml", "--devicememory", "1GiB"], "did you mean --device-memory?"),
        (["fit", "--confg", "dlrm.yaml"], "unknown option --confg; did you mean --config?"),
        (
            ["fit", "--config", "dlrm.yaml", "--lr", "0.1"],
            "--lr; did you mean --model.table_optimizer.learning_rate or --model.dense_optimizer.lr?",
        ),
        (["fit", "--optimizer.help"], "mean --model.table_optimizer.help or --model.dense_optimizer.help?"),
        (["fit", "--max-epochs", "3"], "unknown option --max-epochs; did you mean --trainer.max_epochs?"),
        (["fit", "--network.top_mlp", "[3]"], "did you mean --model.network.top_mlp?"),
        (["fit", "--trainer.help"], "unknown option --trainer.help; --help.all lists all keys"),
        (["plan", "--config", "dlrm.yaml", "--ranks", "zero"], "error: --ranks is zero; expected a whole number"),
        (["plan", "--config", "dlrm.yaml", "--rank", "2"], "unknown option --rank; did you mean --ranks?"),
        (["fit", "--data.help", "SGD"], "--data.help takes no class SGD; it takes Clicks, Criteo, CriteoKaggle, Cr"),
        (["fit", "--model.network.help", "DCNN"], "takes no class DCNN; did you mean DCN? It takes DLRM, DCN, Logis"),
        (["fit", "--trainer.callbacks.help", "Timr"], "did you mean Timer? It takes ReduceOnPlateau, BackboneFinet"),
        (["fit", "--trainer.strategy.help", "X"], "takes no class X; it takes EmbeddingShardedDDP"),
        (["fit", "--model.network.tables.help", "X"], "takes no class; write --model.network.tables.help alone"),
        (["fit", "--trainer.accelerator.help"], "trainer.accelerator has no classes; expected auto, cpu or gpu"),
        (["fit", "--config", "dlrm.yaml", "--model.network", "xDeepFM"], "did you mean XDeepFM?"),
        (["fit", "--config", "dlrm.yaml", "--model.network", "own.py"], "own.py is a Python file; expected a class in"),
        (["fit", "--config", "dlrm.yaml", "--model.network", "./a/own.py"], "expected a class in it: give a.own.CLASS"),
        (["fit", "--config", "dlrm.yaml", "--model.network", "null"], "--model.network is null; expected one of DLRM,"),
        (
            ["fit", "--config", "dlrm.yaml", "--model.network.top_mlp", "[512,x]"],
            "is [512,x], but x is not a whole nu",
        ),
        (
            ["fit", "--config", "dlrm.yaml", "--model.network.tables.device", "3"],
            "device; expected one of dims, mixed",
        ),
        (["fit", "--config", "dlrm.yaml", "--trainer.max_steps", "null"], "max_steps is null; expected a whole number"),
        (["fit", "--config", "dlrm.yaml", "--trainer.callbacks", "[3]"], "callbacks is 3; expected one of ReduceOnPl"),
        (["fit", "--config", "own_data.yaml"], "no model is chosen (overlays such as small.yaml and own_data.yaml ha"),
        (["fit", "--config", "own_data.yaml"], "as in --config dlrm.yaml --config OVERLAY, and give --data.path DIR"),
        (
            ["fit", "--config", "dlrm.yaml", "--run_dir", "/proc/x"],
            "/proc/x: nothing can be made in /proc; choose an",
        ),
        (["fit", "--config", "dlrn.yaml"], "no configuration dlrn.yaml here; did you mean dlrm.yaml?"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], err
    assert err.splitlines()[-1] == errors[0]
    assert list(Path().iterdir()) == [], "nothing is left behind"
    assert "Traceback" not in err + out


def test_bench_gpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "gpu"]) == 2
    missing = "error: bench gpu needs a CUDA device, but torch finds none here: give --predict or --device cpu\n"
    assert capsys.readouterr().err == missing


def test_a_dataset_folder_in_the_given_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine/data").mkdir(parents=True)
    Path("mine/data/dataset.json").touch()
    Path("here").mkdir()
    monkeypatch.chdir("here")
    for place, said in {
        "../mine": "error: ../mine is not a dataset folder: it has no dataset.json; dataset folders in it: ../mine",
        ".": "it has no dataset.json; make it with 'python -m lightning_dlrm preprocess --output",
        "..": "finished",
    }.items():
        Path("../mine/data/dataset.json").unlink() if place == ".." else None
        assert main(["inspect", place]) == 2
        assert said in capsys.readouterr().err


def test_places_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings: dict[str, Any] = {"accelerator": "auto", "strategy": "auto", "devices": "auto"}
    for devices in ("two", "-1", "0,1", [0, 1], "1.5", "0", 0, -1):
        with pytest.raises(UserError, match=r"trainer.devices is .*; expected auto, or a number of ranks, 1 or more"):
            _check_place(settings | {"devices": devices})
    for accelerator in ("gpu", "cuda"):
        with pytest.raises(UserError, match=f"is {accelerator}, but torch finds no CUDA device here; use cpu"):
            _check_place(settings | {"accelerator": accelerator})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for devices in ("-1", "0,1", [0, 1], 2, "2", "auto"):
        _check_place(settings | {"devices": devices})


def test_faults_in_one_of_several_files(capsys: pytest.CaptureFixture[str]) -> None:
    for text, said in {
        "trainer: {max_stepz: 3}": "unknown key trainer.max_stepz; did you mean trainer.max_steps?",
        "modle: {seed: 3}": "unknown key modle.seed; did you mean model",
        "model: {network: {class_path: DLRM, init_args: {embeding_dim: 3}}}": "did you mean model.network.embedding_",
        "trainer: {max_steps: ten}": "trainer.max_steps is ten",
        "trainer: null": "trainer is null; expected keys with values",
        "data: {init_args: {batch_size: null}}": "data.init_args.batch_size is null; expected a whole number",
        "model: {network: null}": "model.network is null; expected a class, such as DLRM",
        "model: {network: {init_args: {top_mlp: [8, x]}}}": "top_mlp is [8, x], but x is not a whole number",
    }.items():
        Path("bad.yaml").write_text(text)
        assert main(["params", "--config", "dlrm.yaml", "--config", "bad.yaml"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: bad.yaml: ") and said in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"trainer:\n  max_steps: [1\n bad: :\n", "bad.yaml is not YAML"),
        (b"\xff\xfe\x00", "bad.yaml is not YAML"),
        (
            b"trainer:\n\tmax_steps: 1\n",
            "bad.yaml is not YAML (line 2: a tab at the beginning; indent with spaces); exp",
        ),
        (
            b"data:\n  bottom_mlp: [1,\n    2\ntrainer: 1\n",
            "(line 4: a comma, or the closing ], is missing before this place, in what begins in line 2); expected a c",
        ),
        (b"trainer:\n    max_steps: 1\n  devices: 1\n", "(line 3: this line is not indented as the lines before it"),
        (b"a: b: c\n", "(line 1: a colon after a value, or a line that is indented too far); expected a"),
        (b"trainer: {}\nabc\n", "(line 3: a key without a colon"),
        (b"a: 'b\nc: 3\n", "(line 3: the closing quotation mark is missing, in what begins in line 1)"),
        (b"a: 1\nb: 2\na: 3\n", "bad.yaml: the key a occurs twice, again in line 3; keep one"),
        (b"", "bad.yaml is empty; expected a configuration: keys such as 'trainer:', each with its values"),
        (b"# nothing\n", "bad.yaml is empty; expected a configuration"),
        (b"- a\n- b\n", "bad.yaml holds no keys with values"),
    ],
)
def test_files_that_are_no_configuration(content: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_bytes(content)
    assert main(["fit", "--config", "dlrm.yaml", "--config", "bad.yaml"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_or_a_file_in_place_of_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("file").touch()
    for arguments, said in {
        "--config run": "run is a folder; expected a YAML file\n",
        "--config dlrm.yaml --ckpt_path file": "checkpoint file is a file; expected a folder such as",
        "--config dlrm.yaml --data.path file": "file is a file; give the dataset folder",
        "--config dlrm.yaml --run_dir file": "--run_dir file is a file; give an empty folder or a new one",
    }.items():
        assert main(["fit", *arguments.split()]) == 2
        assert said in capsys.readouterr().err
    Path("run/config.yaml").touch()
    assert main(["fit", "--config", "run"]) == 2
    assert capsys.readouterr().err == "error: run is a folder; expected a YAML file, such as run/config.yaml\n"


def test_a_run_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*FIT, *QUICK, "--run_dir", "run", "--trainer.max_steps=2"]
    assert main(options) == 0
    before = Path("run/summary.json").read_bytes()
    assert main(options) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert Path("run/summary.json").read_bytes() == before


def test_a_folder_that_is_no_run_is_not_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").write_text("")
    assert main([*FIT, *QUICK, "--run_dir", "thesis", "--resume=auto"]) == 2
    assert "thesis is not a run folder: it holds chapter.tex" in capsys.readouterr().err
    assert [path.name for path in Path("thesis").iterdir()] == ["chapter.tex"]


def test_checkpoint_of_another_model_or_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, *QUICK, "--run_dir", "run", "--trainer.max_steps=2"]) == 0
    checkpoint = ["--ckpt_path", "run/checkpoints/last"]
    dcn: list[Any] = ["validate", "--config", "dcn.yaml", "--config", "small.yaml", *TINY_DEMO, *checkpoint]
    for arguments, message in [
        (dcn, "holds the model DLRM, but this run trains DCN"),
        (["validate", *FIT[1:], "--data.demo.seed=5", *checkpoint], "another encoding (fingerprint"),
        ([*FIT, *QUICK, "--data.demo.train_rows=9000", "--run_dir", "other", *checkpoint], "trained on other rows"),
    ]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["inspect", "mydat"], "mydata"),
        (["fit", "--config", "dlrm.yaml", "--data.path", "mydat"], "mydata"),
        (["preprocess", "--infer", "new.yaml", "--input", "logs/click.csv"], "logs/clicks.csv"),
    ],
)
def test_a_similar_path_is_suggested(arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mydata").mkdir()
    Path("logs").mkdir()
    Path("logs/clicks.csv").touch()
    assert main(arguments) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"; did you mean {meant}?")

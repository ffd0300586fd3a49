"""Contract: help of a class says how the class is chosen, and every option has plain words."""

import inspect
import re

import pytest
import pytorch_lightning as pl

from lightning_dlrm.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "head", "line"),
    [
        (
            "--model.network.help DLRM",
            "The class DLRM: choose it with --model.network DLRM, or in a YAML file with class_path: DLRM. The options "
            "below are keys of its init_args. model: network: class_path: DLRM init_args: KEY: VALUE Bottom MLP",
            "(--model.network.tables.help lists its keys, default: null)",
        ),
        (
            "--data.help Criteo",
            "The class Criteo: choose it with --data Criteo, or in a YAML file with class_path: Criteo. The ",
            "default: 2048)",
        ),
        (
            "--model.dense_optimizer.help torch.optim.Adam",
            "The class Adam: choose it with --model.dense_optimizer torch.optim.Adam, or in a YAML file with ",
            "--model.dense_optimizer.lr VALUE learning rate.",
        ),
        (
            "--model.network.tables.help",
            "The settings of --model.network.tables. In a YAML file the options below are keys of tables. ",
            "(type: Mapping[str, int] | list[str] | str, default: [])",
        ),
        (
            "--data.demo.help",
            "The settings of --data.demo. In a YAML file the options below are keys of demo. Settings of demo data; ",
            "--data.demo.max_table_rows N Most rows of a table; null for the sizes of Criteo Kaggle (default: ",
        ),
        (
            "--trainer.callbacks.help EarlyStopping",
            "The class EarlyStopping: choose it with --trainer.callbacks EarlyStopping, or in a YAML file with ",
            "It must be noted that the patience parameter",
        ),
    ],
)
def test_help_of_a_class_says_how_it_is_chosen(
    arguments: str, head: str, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["fit", *arguments.split()])
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 78
    assert words.startswith(head) and line in words, shown
    assert not re.search(r"`|Union|Sequence|Callable|Untyped|default: \(| \.\. |\bNone\b", shown), shown
    assert arguments != "--data.demo.help" or "--data.batch_size" not in shown


def test_help_has_words_for_every_option_and_no_types_of_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help.all"])
    shown = capsys.readouterr().out
    trainer = shown[shown.index("\nLightning's Trainer:\n") :]
    entries = re.split(r"\n  (?=--)", trainer)[1:]
    assert len(entries) == len(inspect.signature(pl.Trainer).parameters)
    assert not [entry for entry in entries if "type: " in entry or len(entry.split()) < 6]
    assert (
        "`" not in shown
        and "Callable" not in shown
        and "paramref" not in shown
        and "gradients (default: 1)" not in shown
    )
    assert "--trainer.num_nodes N number of machines (default: 1)" in " ".join(shown.split())

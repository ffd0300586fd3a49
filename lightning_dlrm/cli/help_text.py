"""``--help.all``: what jsonargparse and Lightning's docstrings say of every option, made readable."""

import argparse
import contextlib
import io
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from jsonargparse import DefaultHelpFormatter

from lightning_dlrm.cli.classes import OFFERED_CLASSES
from lightning_dlrm.cli.mistakes import classes_of
from lightning_dlrm.contracts.terminal import help_width

_INDENT = 24
"""Column at which jsonargparse's words of an option begin."""
_COLUMN = 8
"""Column at which the words of an option begin here, below its name."""
_REWORDED = {
    "Print the configuration after applying": "print the configuration that all files and options give, and exit",
    'One or more arguments specifying "class_path"': "class of the data, Criteo in the shipped configurations; its "
    "options are --data.path DIR and those that --data.help Criteo lists",
    "Show this help message and exit.": "show the short help; --help.all shows this help",
}
"""Beginning of jsonargparse's words -> ours."""
_OWN_WORDS = {
    "model.network": "class of the network, such as DLRM or DCN; --model.network.help DLRM lists the options of DLRM",
    "model.dense_optimizer": "class of the optimizer of all other parameters, with its options, such as lr; its state "
    "has the parameters' precision",
    "trainer.accelerator": "auto, cpu or gpu; auto takes CUDA devices if there are any",
    "trainer.strategy": "auto on one rank; on several embedding_sharded_ddp, or the class EmbeddingShardedDDP with its "
    "options: Lightning's other strategies, such as ddp, are refused for training on several ranks",
    "trainer.devices": "ranks of this machine: a number, or auto, which is 1 on a CPU and all GPUs of a machine with "
    "GPUs; on GPUs also a list of their numbers, or -1 for all",
    "trainer.num_nodes": "number of machines",
    "trainer.precision": "32-true, bf16-mixed, bf16-true or 64-true; null for 32-true. 32, bf16 and 64 are short names",
    "trainer.logger": "loggers in place of W&B; false for none. A fit also writes metrics.jsonl",
    "trainer.callbacks": "callbacks to add, as a list; --trainer.callbacks+=EarlyStopping adds one",
    "trainer.fast_dev_run": "run only this number of batches of each kind (true for 1), to find mistakes; nothing is "
    "logged or saved",
    "trainer.max_epochs": "end the fit after this number of epochs; -1 for no limit; null for no limit if max_steps is "
    "given, else for 1,000",
    "trainer.min_epochs": "train this number of epochs at least, even if a callback would end the fit earlier",
    "trainer.max_steps": "end the fit after this number of optimizer steps; -1 for no limit",
    "trainer.min_steps": "train this number of optimizer steps at least, even if a callback would end the fit earlier",
    "trainer.max_time": "end the fit after this time, as days:hours:minutes:seconds, such as 00:01:30:00",
    "trainer.limit_train_batches": "batches of a training epoch: a number, or a share such as 0.1; null for all",
    "trainer.limit_val_batches": "batches of a validation: a number, or a share such as 0.1; null for all; 0 for no "
    "validations",
    "trainer.limit_test_batches": "batches that test scores: a number, or a share such as 0.1; null for all",
    "trainer.limit_predict_batches": "batches that predict scores: a number, or a share such as 0.1; null for all",
    "trainer.overfit_batches": "train on this number or share of batches, the same in every epoch; 0 for all",
    "trainer.val_check_interval": "validate after this number of batches, or after this share of an epoch, such as "
    "0.5; null for an epoch",
    "trainer.check_val_every_n_epoch": "validate only in every nth epoch; null counts the batches of "
    "val_check_interval across epochs",
    "trainer.num_sanity_val_steps": "batches of a validation before the first step; -1 for all",
    "trainer.log_every_n_steps": "log training metrics every n optimizer steps; null for 50",
    "trainer.enable_checkpointing": "false saves no checkpoints",
    "trainer.enable_progress_bar": "false shows no progress bar",
    "trainer.enable_model_summary": "true prints Lightning's table of the model's parts",
    "trainer.accumulate_grad_batches": "number of batches whose gradients an optimizer step adds up",
    "trainer.gradient_clip_val": "clip gradients of a larger norm, or a larger absolute value, to it; null or 0 for "
    "no clipping",
    "trainer.gradient_clip_algorithm": "norm or value: what gradient_clip_val limits; null for norm",
    "trainer.deterministic": "true uses only deterministic operators of torch; warn warns about others",
    "trainer.benchmark": "let cuDNN choose the fastest of its convolutions, by timing them",
    "trainer.inference_mode": "evaluate with torch.inference_mode; false for torch.no_grad",
    "trainer.use_distributed_sampler": "give each rank its part of the samples of your own DataLoaders; the data "
    "classes of this project do so themselves",
    "trainer.profiler": "simple, advanced or pytorch, or a class: measure the time of each part of a fit",
    "trainer.detect_anomaly": "end the fit at a gradient that is NaN, and name the operation behind it; slow",
    "trainer.barebones": "turn off logging, checkpoints, bars and profiling, to time Lightning itself",
    "trainer.plugins": "plugins of Lightning, such as one for a cluster, as a list",
    "trainer.sync_batchnorm": "batch normalization uses the samples of all ranks",
    "trainer.reload_dataloaders_every_n_epochs": "0; other numbers are refused, as each epoch has a new order anyway",
    "trainer.default_root_dir": "folder of files that Lightning writes; null for the run folder",
    "trainer.enable_autolog_hparams": "give the module's hyperparameters to the loggers; W&B gets the configuration "
    "in any case",
    "trainer.model_registry": "name of the model in Lightning's registry; has no effect here",
}
"""Option -> its words, in place of those of a docstring, which describe a Python API or offer what is refused here."""
_SETTINGS = "TableSettings|Averaging|Regularization"
"""Types of options that are keys with values, and whose help lists these keys."""
_TAKEN_FROM_THE_FIT = r"  --model\.schedule\.(?:optimizer|total_steps) .*\n(?: {24}.*\n)*"
_LAST = """
--KEY.help CLASS lists the options of a class: --model.network.help DLRM or
--data.help Criteo.
"""
_SECTIONS = (
    "options", "custom classes", "data", "model, loss and optimizers", "checkpoints", "Weights & Biases",
    "Lightning's Trainer", "more examples",
)  # fmt: skip


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A formatter that keeps the lines of examples, and leaves the words of an option to ``readable_help``."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **options | {"width": 100_000, "max_help_position": _INDENT})


def readable_help(text: str) -> str:
    """Return the text of a help, below 100 columns: short names of classes, plain types, no markup of Sphinx, the
    sections in the order of a configuration.

    Args:
        text: as ``HelpFormatter`` formats it, with a line for each option.
    """
    # Help of a class has no usage, links or sections; jsonargparse makes its usage of the name of the program.
    is_class = re.match(r"usage: (?!python -m lightning_dlrm )", text) is not None
    if is_class:
        text = re.sub(r"\Ausage: [\s\S]*?\n\n", "", text)
        text = re.sub(r"\AHelp for --([\w.]+)\.help=([\w.]+)", lambda found: _head(found[1], found[2]), text)
        text = re.sub(r"(?m)^  --[\w.]+ .*\n? {24}\(type: .*Untyped.*\n", "", text)
        text = re.sub(rf"(?m)^{_TAKEN_FROM_THE_FIT}", "", f"{text.rstrip()}\n")
    text = re.sub(r"\nLinked arguments:\n(?:  .*\n)*", "", text)
    # Help of classes, and files of a section, are the same for every key.
    text = re.sub(r"(?m)^  --[\w.]+\.help\b.*\n( {24}Show the help for .*\n)?", "", text)
    text = re.sub(r"(?m)^  --\w+ CONFIG +Path to a configuration file\.\n", "", text)
    head, *sections = re.split(rf"\n\n(?=(?:{'|'.join(_SECTIONS)}):\n)", text.rstrip())
    sections.sort(key=lambda section: _SECTIONS.index(section.partition(":\n")[0]))
    text = "\n\n".join([head, *sections])
    # An option's name and its words on two lines, also if they are on one.
    text = re.sub(
        rf"(?m)^(?=  -)(.{{{_INDENT - 2}}})  (?=\S)", lambda found: f"{found[1].rstrip()}\n{'':{_INDENT}}", text
    )
    text = re.sub(rf"(?m)^  (-.*)\n {{{_INDENT}}}(.*)$", lambda found: _entry(found[1], found[2]), text)
    if is_class:
        text = re.sub(r"(?m)^\S.{78,}$", lambda found: _wrap(found[0], ""), text)
    return text.replace("`", "") + "\n" + _LAST * (not is_class)


@contextlib.contextmanager
def only_settings(key: str | None) -> Iterator[None]:
    """Context in which help of a class is cut to the settings of one of its keys, such as ``data.demo``.

    Args:
        key: the key; None to show everything.
    """
    if key is None:
        yield
        return
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            yield
    finally:
        parts = [part for part in shown.getvalue().split("\n\n") if re.search(rf"(?m)^  --{key}\.", part)]
        print("\n\n".join([_head(key, ""), *parts]) if parts else shown.getvalue(), end="")


def _head(key: str, path: str) -> str:
    """Return the first words of the help of a class, or of settings, which are not chosen by a class."""
    name, section = path.rpartition(".")[2], key.rpartition(".")[2]
    is_offered = name in (known.__name__ for known in OFFERED_CLASSES)
    if is_offered or (name and classes_of(key)):
        # Optimizers of torch have the names of update rules.
        chosen = name if is_offered and not path.startswith("torch.") else path
        words = (
            f"The class {name}: choose it with --{key} {chosen}, or in a YAML file with class_path: {chosen}. The "
            "options below are keys of its init_args."
        )
    else:
        words = f"The settings of --{key}. In a YAML file the options below are keys of {section}."
        return _wrap(words, "")
    if key.startswith("trainer."):
        return _wrap(words, "")
    # Callbacks are a list; other classes are at their key.
    keys = [*key.split("."), f"class_path: {chosen}"]
    example = [f"{'  ' * (depth + 1)}{name}{':' * (name != keys[-1])}" for depth, name in enumerate(keys)]
    indent = "  " * len(keys)
    return "\n".join([_wrap(words, ""), "", *example, f"{indent}init_args:", f"{indent}  KEY: VALUE"])


def _entry(option: str, words: str) -> str:
    """Return the lines of an option: its name and what it takes, then its words, and in brackets its default."""
    named = re.match(r"(?:-\w \w+, )?--([\w.]+)", option)
    key = named[1] if named else ""
    plain = _plain(words)
    facts = re.search(r" ?\((required, )?type: (.*?)(?:, default: (.*?))?(?:, classes: (.*))?\)$", plain)
    if facts is None:
        shown = "--data CLASS" if key == "data" else option
        return f"  {shown}\n{_wrap(plain, ' ' * _COLUMN)}"
    required, kind, default, classes = facts.groups()
    said = _OWN_WORDS.get(key, plain[: facts.start()].rstrip("."))
    value = "CLASS" if classes else "PATH" if key.endswith("_dir") else _value(kind)
    choices = [choice for choice in kind.split(" | ") if choice not in ("null", "bool")]
    names_all = all(re.search(rf"\b{re.escape(choice)}\b", said) for choice in choices)
    kept = ["required" if required else ""]
    if re.search(_SETTINGS, kind):
        value, kept = "KEYS", [f"--{key}.help lists its keys"]
    elif value == "NAME" and not names_all:
        kept.append(f"one of {', '.join(choices)}")
    elif key not in _OWN_WORDS and ((value == "VALUE" and not names_all) or kind.startswith("list[list")):
        kept.append(f"type: {kind}")
    if default is not None and not re.search(r"\bby default\b", said) and (default != "null" or key not in _OWN_WORDS):
        kept.append(f"default: {default}")
    # Words may name all classes.
    if classes and not key.startswith("trainer.") and not all(name in said for name in classes.split(", ")):
        kept.append(f"classes: {classes}")
    shown = ", ".join(filter(None, kept))
    return f"  --{key} {value}\n{_wrap(f'{said} ({shown})' if shown else said, ' ' * _COLUMN)}"


def _value(kind: str) -> str:
    """Return what stands for the value of an option of a type.

    >>> [_value(kind) for kind in ("int | null", "float | int", "bool", "list[int] | null", "dot | cat", "int | x")]
    ['N', 'NUMBER', 'true|false', 'LIST', 'NAME', 'VALUE']
    """
    kinds = set(kind.split(" | ")) - {"null"}
    for value, types in {"N": {"int"}, "NUMBER": {"int", "float"}, "TEXT": {"str"}, "PATH": {"str", "Path"}}.items():
        if kinds <= types:
            return value
    if kinds == {"bool"}:
        return "true|false"
    if all(one.startswith("list[") for one in kinds):
        return "LIST"
    return "NAME" if all(re.fullmatch(r"[a-z][\w-]*", one) for one in kinds) and not kinds & _TYPES else "VALUE"


_TYPES = {"int", "float", "bool", "str", "dict"}


def _wrap(words: str, indent: str) -> str:
    width = help_width()
    # A default stays with its name.
    words = re.sub(r"(\(default:|, default:) (?=\S)", "\\1\0", words)
    return textwrap.fill(
        words, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ).replace("\0", " ")


def _plain(words: str) -> str:
    """Return the words of an option without markup; the default once; types as in Python's annotations."""
    for beginning, reworded in _REWORDED.items():
        if words.startswith(beginning):
            return reworded
    words = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)(?:<\w+>)?`", r"\1", words).replace("`_", "`")
    words = re.sub(r" Default: [^ ]+\.?(?= \()", "", words).replace(" .. note::", "")
    # Docstrings of torch repeat the default.
    words = re.sub(r" \(default: (?:[^()]|\([^()]*\))*\)(?=\.? .*\(type: )", "", words)
    words = re.sub(r"default: \((.*?),?\)", r"default: [\1]", words)
    words = re.sub(r", known subclasses: (.*)\)$", lambda found: f"{_classes(found[1])})", words)
    # As in YAML.
    words = re.sub(r"\b(?:None|True|False)\b", lambda found: {"None": "null"}.get(found[0], found[0].lower()), words)
    return re.sub(r"(?<=\btype: ).*?(?=, default: |, classes: |\)$)", lambda found: _type(found[0]), words)


def _classes(paths: str) -> str:
    """Return the short names of the classes that an option takes, without base classes and internal ones."""
    offered = {known.__name__ for known in OFFERED_CLASSES}
    ours = ("lightning_dlrm", "datamodules", "torch", "pytorch_lightning", "lightning_fabric")
    names = dict.fromkeys(
        path.rpartition(".")[2]
        for path in paths.split(", ")
        if path.partition(".")[0] not in ours or path.rpartition(".")[2] in offered
    )
    return f", classes: {', '.join(names)}" if names else ""


def _type(annotation: str) -> str:
    """Return a type as in YAML: without ``Union``, ``Optional``, ``Literal`` and functions.

    >>> _type("Union[Literal['a', 'b'], Sequence[int], tuple[str, ...], Optional[Callable[[int], Loss]]]")
    'a | b | list[int] | list[str] | Loss | null'
    """

    def joined(found: re.Match[str]) -> str:
        kind, parts = found[1], found[2].replace("'", "")
        if kind in ("Union", "Literal", "Optional"):
            # Not at commas of parts that have brackets of their own.
            alternatives = re.split(r", (?![^⟨]*⟩)", parts)
            return " | ".join(alternatives + ["null"] * (kind == "Optional"))
        return f"{kind}⟨{parts}⟩"

    annotation = re.sub(r"\btuple\[([^][]*), \.\.\.\]", r"list[\1]", annotation.replace("Sequence[", "list["))
    while (inner := re.sub(r"(\w*)\[([^][]*)\]", joined, annotation)) != annotation:
        annotation = inner
    annotation = annotation.replace("⟨", "[").replace("⟩", "]")
    # A configuration names the class of what a function makes.
    return re.sub(r"\bCallable\[\[.*?\], (\w+)\]", r"\1", annotation)

"""Write docs/commands.md and docs/configuration.md from the parsers and docstrings of the code.

Run: python docs/reference.py
"""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import io
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from docstring_parser import parse_from_object

DOCS = Path(__file__).resolve().parent
# The packages of this checkout, not of the one that is installed.
sys.path.insert(0, str(DOCS.parent))

import lightning_dlrm
from lightning_dlrm import __main__ as entry
from lightning_dlrm.cli import parser as cli
from lightning_dlrm.cli.importing import make_parser as import_parser
from lightning_dlrm.cli.params import _parser as params_parser
from lightning_dlrm.cli.plain_parser import HelpParser, typed_form, words_of
from lightning_dlrm.cli.plan import _parser as plan_parser
from lightning_dlrm.cli.short_help import SHORT_HELP
from lightning_dlrm.compare.options import make_parser as compare_parser
from lightning_dlrm.models.baselines import MLP
from lightning_dlrm.optim.schedules import Constant, Cosine, WarmupQuadraticDecay, WarmupThenDecay
from lightning_dlrm.tables.embeddings import MixedDimensions, QuotientRemainder

OURS = {
    "ckpt_path": "fit: the checkpoint to continue from: a folder, from which a new run starts, or `best` or `last`, "
    "from which the run in --run_dir continues; other commands: the checkpoint to score, in the same forms",
    "print_config": "print the configuration that all files and options give, and end",
    "published": "published scores (metric, value, source), shown at the end of a run and in reports",
}
"""Options whose help is Lightning's, or is long -> what they mean here."""
LEFT_OUT = ("help", "published.help", "trust")
DATA = ("Clicks", "Criteo", "CriteoKaggle", "CriteoTerabyte", "DemoSettings", "RandomData", "TraceData")
SECTIONS = ("model", "data", "trainer", "checkpoint", "wandb")

# --- commands ---------------------------------------------------------------------------------------

COMMANDS_HEAD = """\
# Commands

On this page you find every command with its options. It is made from the code by `python docs/reference.py`.

Each command is `python -m lightning_dlrm COMMAND`; the installed script `lightning-dlrm COMMAND` is the same. `--help`
explains a command, `--version` prints the release, and with `--debug` an error also shows its traceback. Options cannot
be abbreviated. A user error is one line that begins with `error:`, with exit code 2.
"""


SHARED_HEAD = """\
## Options of every command with a configuration

`fit`, `validate`, `test`, `predict`, `params` and `plan` take these options, `--trust MODULE`, and every key of a
configuration ([Configuration keys](configuration.md)). `params` and `plan` train nothing and open no checkpoint: of
these they take `--config`, `--print_config` and `--seed_everything`, and read the others in the config.yaml of a run.
`validate` and `test` also take `--verbose true`, which prints Lightning's table of metrics.

"""


@cache
def fit_parser() -> cli.CommandParser:
    return cli.build_trainer_parser("fit")


def cell(text: str) -> str:
    """Return text as the cell of a table."""
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


def option_table(actions: Iterable[argparse.Action]) -> str:
    rows = []
    for action in actions:
        # A name in capitals that repeats the option says nothing; jsonargparse writes print_config with a backspace.
        name = typed_form(action).partition(" \b")[0].removesuffix(f" {action.dest.upper()}")
        rows.append(f"| `{name}` | {cell(OURS.get(action.dest) or words_of(action))} |")
    return "\n".join(["| option | meaning |", "|---|---|", *rows]) if rows else ""


def described(parser: argparse.ArgumentParser) -> str:
    """Return what ``--help`` says around the options."""
    usage = f"usage: {parser.usage}" if parser.usage else None
    words = [text for text in (usage, parser.description, parser.epilog) if text]
    return "".join(f"```text\n{text.strip()}\n```\n\n" for text in words)


def plain_command(name: str) -> str:
    module, add_arguments, _ = entry._PLAIN[name]
    parser = entry.PlainParser(prog=f"python -m lightning_dlrm {name}", description=entry.COMMANDS[name])
    getattr(importlib.import_module(module), add_arguments)(parser)
    parts = [f"## {name}\n\n{described(parser)}"]
    if parser.works is None:
        return parts[0] + option_table(all_of(parser)) + "\n"
    for work, inner in parser.works.choices.items():
        inner.complete()
        inner = import_parser() if (name, work) == ("checkpoint", "import") else inner
        parts.append(f"### {name} {work}\n\n{described(inner)}{option_table(all_of(inner))}\n")
    return "\n".join(parts)


def all_of(parser: HelpParser) -> list[argparse.Action]:
    return [action for actions in parser.sections.values() for action in actions]


def own_actions(parser: cli.CommandParser, known: Iterable[str] = ()) -> list[argparse.Action]:
    """Return the options of a parser that are no keys of a section."""
    skipped = (*SECTIONS, *LEFT_OUT, *known)
    listed = parser.listed_actions()
    return [action for action in listed if action.dest not in skipped and action.dest.split(".")[0] not in skipped]


def configured_command(name: str, actions: list[argparse.Action]) -> str:
    table = option_table(actions)
    more = f"Further options of this command:\n\n{table}\n" if actions else ""
    return f"## {name}\n\n```text\n{SHORT_HELP[name].strip()}\n```\n\n{more}"


def commands_page() -> str:
    shared = own_actions(fit_parser())
    names = [action.dest for action in shared]
    parts = [COMMANDS_HEAD]
    parts.append(f"{SHARED_HEAD}{option_table(shared)}\n")
    own = {"params": params_parser(), "plan": plan_parser()}
    for name in entry.COMMANDS:
        if name in SHORT_HELP:
            parts.append(configured_command(name, own_actions(own[name], names) if name in own else []))
        elif name == "compare":
            found = compare_parser()
            parts.append(f"## compare\n\n{described(found)}{option_table(all_of(found))}\n")
        else:
            parts.append(plain_command(name))
    return "\n".join(parts)


# --- configuration keys -----------------------------------------------------------------------------

CONFIGURATION_HEAD = """\
# Configuration keys

On this page you find every key of a configuration, with its type, default and unit. It is made from the code by
`python docs/reference.py`.

A class is named by `class_path`, and its arguments are below `init_args`:

```yaml
model:
  table_optimizer:
    class_path: SGD
    init_args:
      learning_rate: 10.0
```

On the command line that is `--model.table_optimizer SGD --model.table_optimizer.learning_rate 10`.
[Configure a run](configure.md) explains files, overlays and options.
"""


def type_words(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = inspect.formatannotation(annotation) if not isinstance(annotation, str) else annotation
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text)
    return text.replace("NoneType", "None")


_IN_YAML = {"None": "null", "True": "true", "False": "false"}


def default_words(found: Callable[..., Any], parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is inspect.Parameter.empty:
        # The command line takes null for what may be None.
        return "`None`" if "None" in type_words(parameter.annotation) else "required"
    for field in dataclasses.fields(found) if dataclasses.is_dataclass(found) else ():
        if field.name == parameter.name and callable(field.default_factory):
            value = field.default_factory()
    if dataclasses.is_dataclass(value):
        return f"those of {type(value).__name__}"
    return f"`{value!r}`" if not isinstance(value, tuple) or value else "`[]`"


def keys_of(found: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the arguments of a network with those that it passes on to its base class; of other classes their own."""
    keys = dict(inspect.signature(found).parameters)
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in keys.values())
    if passes_on and isinstance(found, type) and issubclass(found, lightning_dlrm.CTRNetwork):
        return keys_of(found.__mro__[1]) | keys
    return keys


def key_table(found: Callable[..., Any], skip: Iterable[str] = ()) -> str:
    """Return a table of the arguments of a class, with their descriptions in its docstring or that of its bases."""
    words = {}
    for base in reversed(inspect.getmro(found) if isinstance(found, type) else (found,)):
        if base.__module__.startswith(("lightning_dlrm", "datamodules")):
            words |= {p.arg_name: p.description or "" for p in parse_from_object(base).params}
    rows = []
    for name, parameter in keys_of(found).items():
        if name in skip or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        kind = cell(type_words(parameter.annotation))
        kind = f"`{kind}`" if kind else ""
        row = f"| `{name}` | {kind} | {default_words(found, parameter)} | {cell(words.get(name, ''))} |"
        # As in YAML.
        rows.append(re.sub(r"\b(?:None|True|False)\b", lambda found: _IN_YAML[found[0]], row))
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) if rows else "It has no keys."


def class_section(found: type, skip: Iterable[str] = ()) -> str:
    summary = parse_from_object(found).short_description or ""
    return f"### {found.__name__}\n\n{summary}\n\n{key_table(found, skip)}\n"


def configuration_page() -> str:
    of_network = ("features", "seed")
    public = {name: getattr(lightning_dlrm, name) for name in lightning_dlrm.__all__}
    base = public["CTRNetwork"]
    networks = [
        found for found in public.values() if isinstance(found, type) and issubclass(found, base) and found is not base
    ]
    networks.append(MLP)
    folder_data = public["Clicks"].__mro__[1]
    groups = {
        "checkpoint": ("", [cli.CheckpointSettings]),
        "wandb": ("", [cli.WandbSettings]),
        "published": ("A list; each item has these keys.", [cli.PublishedScore]),
        "model": ("`schema` and `seed` are taken from the data and from `seed_everything`.", [public["CTRModule"]]),
        "model.network": ("The features and the seed are taken from the data and from `seed_everything`.", networks),
        "model.network.init_args.tables": (
            "`tables` of every network.", [public["TableSettings"], MixedDimensions, QuotientRemainder],
        ),
        "model.table_optimizer, model.wide_optimizer": (
            "Update rules of table rows. Learning rates are per step, before the schedule changes them.",
            [public[name] for name in ("SGD", "Adagrad", "RowWiseAdagrad", "Adam")],
        ),
        "model.dense_optimizer": ("Any class of `torch.optim`, with its own keys, such as `lr`.", []),
        "model.schedule": (
            "These, or any LRScheduler of torch. Steps are optimizer steps, and shares are of the whole fit.",
            [Constant, WarmupThenDecay, Cosine, WarmupQuadraticDecay],
        ),
        "model.loss": ("", [public[f"{name}Loss"] for name in ("Log", "ProbabilityLog", "WeightedLog", "Focal")]),
        "model.averaging, model.regularization": ("", [public["Averaging"], public["Regularization"]]),
        "data": (
            "All datamodules take the keys of FolderData as well as their own; sizes of batches count samples over all "
            "ranks.",
            [folder_data, *(public[name] for name in DATA)],
        ),
        "trainer": (trainer_words(), []),
        "trainer.strategy": (
            "`embedding_sharded_ddp` is the name of this class with its defaults.", [public["EmbeddingShardedDDP"]],
        ),
        "trainer.callbacks": ("Lightning's callbacks, and this one.", [public["ReduceOnPlateau"]]),
    }  # fmt: skip
    left_out = {"model": ("schema", "seed"), "model.schedule": ("optimizer", "total_steps"), "data": ("folder",)}
    top = option_table(action for action in own_actions(fit_parser()) if action.dest != "config")
    parts = [CONFIGURATION_HEAD, f"## Keys at the top\n\n{top}\n"]
    for title, (words, classes) in groups.items():
        parts.append(f"## {title}\n\n{words}\n" if words else f"## {title}\n")
        parts += [
            class_section(found, of_network if found in networks else left_out.get(title, ())) for found in classes
        ]
    return "\n".join(parts)


def trainer_words() -> str:
    changed = "\n".join(f"| `{name}` | `{value}` |" for name, value in cli.TRAINER_DEFAULTS.items())
    names = ", ".join(f"`{name}`" for name in inspect.signature(pl.Trainer).parameters)
    return (
        "The arguments of Lightning's Trainer, as [Lightning documents them]"
        "(https://lightning.ai/docs/pytorch/stable/common/trainer.html). These have other defaults here:\n\n"
        f"| key | default |\n|---|---|\n{changed}\n\nAll keys: {names}."
    )


def pages() -> dict[str, str]:
    """Return the pages that are made from the code: name -> text."""
    made = {"commands.md": commands_page(), "configuration.md": configuration_page()}
    return {name: re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n" for name, text in made.items()}


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        made = pages()
    for name, text in made.items():
        (DOCS / name).write_text(text)

"""Error messages of the command line: jsonargparse's messages shortened to one line each."""

import inspect
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_dlrm.cli.classes import OFFERED_CLASSES, PRECISIONS
from lightning_dlrm.cli.configs import file_with_key, find_config, flat, option_with_key
from lightning_dlrm.cli.plain_parser import long_form, words_of_fault
from lightning_dlrm.cli.short_help import EVALUATIONS
from lightning_dlrm.cli.suggestions import suggested_keys
from lightning_dlrm.cli.trust import refusal
from lightning_dlrm.contracts.documents import read_yaml
from lightning_dlrm.contracts.errors import KIND_WORDS, in_yaml, listed, nearest, nearest_first
from lightning_dlrm.tracking.run_folder import CONFIG

_PUBLISHED = "a list of metric, value and source, such as [{metric: auc, value: 0.8, source: a paper}]"
_NO_CLASS_AT_ALL = r"(?:Not a valid subclass|an import path).*Got value: (?!Namespace)(.*)"
_NO_KEYS = ", as there are no keys here"
_NO_CLASS = (
    "no class that has this key is chosen; a file that holds changes only, such as an overlay or one that plan writes, "
    "needs a model's YAML before it: --config dlrm.yaml --config places.yaml"
)
_NO_MODEL = (
    "no model is chosen (overlays such as small.yaml and own_data.yaml have none): begin with a model, as in --config "
    "dlrm.yaml --config OVERLAY"
)


def with_place(message: str, command: str, arguments: Sequence[str]) -> str:
    """Return a message with the place of what it is about: the file that has a key, the option that is unknown or lacks
    a value, or the configuration of the checkpoint that is given without one.

    Args:
        message: the message.
        command: name of the command.
        arguments: of the command line.
    """
    # Paths may hold spaces.
    options = dict(itertools.pairwise(itertools.chain.from_iterable(argument.split("=", 1) for argument in arguments)))
    network = file_with_key(arguments, "model.network")
    if (
        message.startswith(("data: ", "data.path is missing"))
        and not network
        and not any(part.startswith("--model.network") for part in arguments)
    ):
        message = f"{_NO_MODEL}, and give --data.path DIR"
    if message == _NO_MODEL and network:
        message = "model.network is null; expected a class, such as DLRM"
    if element := re.fullmatch(r"([\w.]+) is (.+); expected (a whole number|a number|text)", message):
        message = _of_element(message, element, arguments, options)
    if (found := re.match(r"unknown key ([\w.-]+)|([\w.]+)(?: is | takes |: )", message)) is not None:
        if found[1] and (typed := option_with_key(arguments, found[1])):
            return _as_option(message, found[1], typed)
        file = file_with_key(arguments, found[1] or found[2])
        return message if file is None else f"{file}: {message}"
    if (option := re.match(r"(--[\w.-]+) needs a value", message)) is not None:
        # argparse names an option's section, such as --data of --data.path.
        for given, value in itertools.pairwise([*arguments, "--"]):
            if given.startswith(option[1]) and "=" not in given and value.startswith("--"):
                return message.replace(option[1], given)
    if not message.startswith("no model is chosen") or command not in EVALUATIONS:
        return message
    checkpoint = options.get("--ckpt_path")
    if checkpoint is None:
        run = Path("runs/NAME")
        return (
            f"{command} needs a model and a checkpoint: give --config {run / CONFIG} --ckpt_path {run}/checkpoints/best"
        )
    if checkpoint in ("best", "last"):
        run = Path(options.get("--run_dir", "RUN"))
    else:
        run = Path(checkpoint).parents[1] if len(Path(checkpoint).parts) > 2 else Path("RUN")
    return f"no model is chosen: give the configuration of the checkpoint's run, --config {run / CONFIG}"


def _of_element(message: str, found: re.Match[str], arguments: Sequence[str], options: Mapping[str, str]) -> str:
    """Return the message about an element of a list as one about the list, which an option or a file gives."""
    key = found[1].replace(".init_args", "")
    if (option := option_with_key(arguments, key)) is not None:
        given = options.get(option, "")
    else:
        file = file_with_key(arguments, key)
        values = {} if file is None else flat(read_yaml(find_config(file)))
        given = in_yaml(next((value for name, value in values.items() if name.replace(".init_args", "") == key), ""))
    return f"{key} is {given}, but {found[2]} is not {found[3]}" if given.startswith("[") else message


def _as_option(message: str, key: str, option: str) -> str:
    """Return the message about an unknown key as one about an option.

    >>> _as_option("unknown key confg; did you mean config?", "confg", "--confg")
    'unknown option --confg; did you mean --config?'
    """
    words = message.replace(f"unknown key {key}", f"unknown option {option}", 1)
    dashed = partial(re.sub, r"(?<![\w.-])(?!or\b)\w[\w.-]*", r"--\g<0>")
    return re.sub(r"(?<=; did you mean ).*(?=\?$)", lambda found: dashed(found[0]), words)


def explain(message: str, known: Sequence[str]) -> str:
    """Return jsonargparse's message in one line, with the nearest key or class if one is misspelt."""
    if fault := re.fullmatch(r"argument (.+?): (.*)", message, re.DOTALL):
        return words_of_fault(long_form(fault[1]), fault[2])
    if unknown := re.fullmatch(r"unrecognized arguments: ([^-]\S*)(?<!\.yaml)(?<!\.yml)(?: .*)?", message):
        return f"unknown argument {unknown[1]}; options begin with --, and --help lists them"
    named = re.search(r'Parser key "([\w.]+)"|^--([\w.]+)\.help: ', message)
    key = named[1] or named[2] if named else "value"
    given = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
    if explained := _explain_import(key, message):
        return explained
    if loop := re.search(r"Config file loop detected: (\S+)", message):
        return f"{key} is {loop[1]}, which holds other keys than those of a class; give a class, or --config {loop[1]}"
    # A nested parser has already shortened its message.
    if match := re.search(r"unknown key .*", message):
        words = match[0] if named is None else _with_full_keys(match[0], key)
        found = words.removesuffix(_NO_KEYS)
        return words if found == words else f"{found}: {_NO_CLASS}"
    if match := re.search(r"[\w.]+: [^\s:,]+ is not one of [\w.-]+(, [\w.-]+)*", message):
        return f"{key}.{match[0]}"
    if match := re.search(r"(?m)^[ -]*([a-z][\w.]* is .*; expected .*|[a-z][\w.]*: .* is not a list; .*)", message):
        return f"{key}.{match[1]}"
    if given and (match := re.search(r"Subtypes: \[(<class '(?:float|int)'>.*)\]", message)):
        return f"{key} is {given[1].strip()}; expected {_type_words(match[1])}"
    if re.search(r"arguments are required: [\w.]*\bmodel\.network\b", message):
        return _NO_MODEL
    if match := re.search(r"unrecognized arguments: (?!-)(\S+\.ya?ml)\b", message):
        return f"unrecognized argument {match[1]}; did you mean --config {match[1]}?"
    if match := re.search(
        r"Option '([\w.-]+)' is not accepted|Group '([\w.]+)' does not accept option '([\w.-]+)'"
        r"|unrecognized arguments: --([\w.-]+)",
        message,
    ):
        key = match[1] or match[4] or f"{match[2]}.{match[3]}"
        return f"unknown key {key}{_NO_KEYS if set(known) <= {'help'} else suggested_keys(key, known)}"
    if explained := _explain_named(key, given[1].strip() if given else "", message):
        return explained
    if explained := _explain_section(key, given[1] if given else "", message):
        return explained
    if classes_of(key) and (wrong := re.search(_NO_CLASS_AT_ALL, message)):
        return f"{key} is {wrong[1]}; expected one of {listed(classes_of(key))}"
    if "collections.abc.Callable" in message:
        return _explain_factory(key, message)
    # The message lists the error of data's class, already shortened, and that data is not None.
    if match := re.search(
        r"LightningDataModule'>.*?Errors:\s+- (.*?)\n\s+- Expected a <class 'NoneType'>", message, re.S
    ):
        return f"data: {match[1]}" if match[1].startswith("the following") else f"data.{match[1]}"
    if match := re.search(r"([\w.]+): Expected a <class '[\w.]*Sequence'>\. Got value: (.*)", message):
        value = match[2].strip()
        return f"{key}.{match[1]}: {value} is not a list; write {_list_of_numbers(value) or f'[{value}]'}"
    if given and (explained := _explain_value(key, given[1].strip(), message)):
        return explained
    line = " ".join(part.strip(" -") for part in message.splitlines() if part.strip())
    # The error of a linked setting is in this project's own message.
    line = re.sub(r"Call to compute_fn of link .*? failed: ", "", line)
    return re.sub(r"(?:a )?<class '(\w+)'>", r"\1", re.sub(r'Parser key "([\w.]+)":', r"\1:", line))


def _explain_named(key: str, given: str, message: str) -> str | None:
    """Return what is wrong with the class of a key or with its arguments; None if the message is about neither."""
    if match := re.search(r"Expected a dot import path string: (\w+)|[Uu]nable to import .*?'(\w+)'", message):
        name = match[1] or match[2]
        if key != "value" and not classes_of(key) and key.startswith("model."):
            return f"{key} is {name}; expected keys with values, which --{key}.help lists"
        return f"{key} takes no class {name}{nearest_first(name, classes_of(key) or _fitting('object'), 'it takes')}"
    if match := re.search(r"does not correspond to a subclass of (UpdateRule|Loss)", message):
        return _explain_class(message, match[1])
    if missing := re.search(r"arguments are required: ([\w.]+)", message):
        # The parser of a class does not know the key of the class.
        option = f"{key}.{missing[1]}"
        return (
            f"{missing[1]} is missing: give it a value" if key == "value" else f"{option} is missing: give --{option}"
        )
    if "PublishedScore" in message:
        return f"{key} is {given or 'something else'}; expected {_PUBLISHED}"
    if match := re.search(r"[Ii]mport path ?([\w.]*) does not correspond to a subclass of (\w+)", message):
        name = match[1] or given or "this class"
        return f"{key}: {name} is not a subclass of {match[2]}; derive your class from {match[2]}"
    return None


def _with_full_keys(words: str, section: str) -> str:
    """Return the message about a key of a section with its full name, and that of the key that was probably meant.

    >>> _with_full_keys("unknown key top_mpl; did you mean top_mlp?", "model.network")
    'unknown key model.network.top_mpl; did you mean model.network.top_mlp?'
    """
    return re.sub(rf"(unknown key |did you mean )(?!{re.escape(section)}\.)", rf"\1{section}.", words)


def _explain_import(key: str, message: str) -> str | None:
    """Return the message about a class that cannot be imported; None if it is about something else."""
    if match := re.search(r"Importing '([\w.]+)' is not allowed", message):
        return f"{key}: {refusal(match[1])}"
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        classes = [name for name, _ in inspect.getmembers(sys.modules.get(match[1]), inspect.isclass)]
        suggestion = nearest(match[2], classes).replace("you mean ", f"you mean {match[1]}.")
        own = [name for name in classes if getattr(sys.modules[match[1]], name).__module__ == match[1]]
        known = f"; its classes are {listed(own)}" if own and not suggestion else ""
        return f"{key}: there is no {match[1]}.{match[2]}{suggestion or known}"
    if match := re.search(r"No module named '([\w.]+)'", message):
        return f"{key}: there is no module {match[1]}, neither installed nor in the current folder"
    return None


def _explain_section(key: str, value: str, message: str) -> str | None:
    """Return the message about a class without a required key, or a section that has no keys; None if it is about
    something else."""
    needed = re.search(r"- (\w+) is missing: give it a value", message)
    of_class = rf"class_path='(?:\w+\.)*(\w+)', init_args=Namespace\([^()]*\b{needed[1]}=None" if needed else ""
    if needed and (chosen := re.search(of_class, value)):
        give = f"give --{key}.{needed[1]}, or in a YAML file init_args: {needed[1]}"
        return f"{key}: {chosen[1]} needs {needed[1]}: {give}"
    if match := re.search(r"Unable to load config ['\"](.*?)['\"]", message):
        return f"{key} is {match[1]}; expected keys with values, which --help.all lists"
    return None


def _explain_value(key: str, value: str, message: str) -> str | None:
    """Return the message about a value of another type; None if it is about something else."""
    if re.search(r"Expected a <class '(?:tuple|list|collections\.abc\.Sequence)'>", message):
        if meant := _list_of_numbers(value):
            return f"{key}: {value} is not a list; write {meant}"
        if "list[int]" in message or key.endswith("_mlp"):
            return f"{key} is {value}; expected a list of whole numbers such as [512, 256]"
        return f"{key}: {value} is not a list; write [{value}]"
    if key == "trainer.max_time":
        return f'{key} is {value}; expected days:hours:minutes:seconds in quotes, such as "00:01:30:00"'
    literals = re.findall(r"typing\.Literal\[(.*?)\]", message)
    allowed = ["true", "false"] if "Expected a <class 'bool'>" in message else []
    allowed += dict.fromkeys(re.findall(r"'([\w.-]+)'", " ".join(literals)))
    if key == "trainer.precision":
        # Other precisions, which Lightning accepts, are refused later.
        allowed = [name for name in allowed if name in PRECISIONS]
    if len(allowed) == 1:
        return f"{key} is {value}; expected {allowed[0]}"
    if allowed == ["true", "false"] and "Expected a <class 'int'>" in message:
        return f"{key} is {value}; expected a whole number, true or false"
    if allowed:
        return f"{key}: {value} is not one of {', '.join(allowed)}"
    if match := re.search(r"Subtypes: \[(.*), <class 'NoneType'>\]", message):
        return f"{key} is {value}; expected {_type_words(match[1])}"
    if match := re.search(r"Expected (?:an? )?(<class '[\w.]+'>)\. Got value", message):
        return f"{key} is {value}; expected {_type_words(match[1])}"
    return None


def _list_of_numbers(value: str) -> str | None:
    """Return the YAML list of whole numbers that was probably meant; None if it is unclear.

    >>> _list_of_numbers("512-256"), _list_of_numbers("512, 256"), _list_of_numbers("64"), _list_of_numbers("3.5x")
    ('[512, 256]', '[512, 256]', '[64]', None)
    """
    numbers = value.split(".") if value.count(".") > 1 else re.split(r"[^\w.]+", value)
    return f"[{', '.join(numbers)}]" if all(number.isdecimal() for number in numbers) else None


def _type_words(types: str) -> str:
    """Return the types of a message in words.

    >>> _type_words("<class 'int'>, <class 'float'>, <class 'NoneType'>"), _type_words("<class 'pathlib.Path'>")
    ('a number', 'a path')
    """
    names = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types).split(", ")
    words = KIND_WORDS | ({"int": "a number"} if "float" in names else {})
    return " or ".join(dict.fromkeys(words.get(name, name) for name in names if name not in ("NoneType", "Tensor")))


def _explain_class(message: str, base: str) -> str:
    """Return the message about a class of another library, if a class of this project is needed."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    given = re.search(r"Import path ([\w.]+) does", message) or re.search(r"Given value: (\S+)", message)
    why = ", and cannot update single rows of a table" if base == "UpdateRule" else ""
    return (
        f"{key[1] if key else 'class'}: {given[1] if given else 'this class'} is not a class of this project{why}; "
        f"choose one of {', '.join(_fitting(base))}"
    )


def _explain_factory(key: str, message: str) -> str:
    """Return the message about a class that makes an optimizer or a schedule, or about its settings."""
    # The message also says that None and a file would be accepted.
    found = re.search(r"Errors:\s+- (.*?)\n\s+- Expected a <class 'NoneType'>", message, re.S)
    reason = re.sub(r".*expects a function or a callable class: ", "", found[1] if found else message, flags=re.S)
    if match := re.search(r"Expected '([\w.]+)' to be a subclass", reason):
        base = _BASES.get(key, "object")
        choice = ", ".join(_fitting(base))
        return (
            f"{key}: {match[1]} is not a subclass of {base}; choose one of {choice}, or derive your class from {base}"
        )
    return f"{key}: {' '.join(reason.split())}"


_BASES = {
    "data": "LightningDataModule",
    "trainer.callbacks": "Callback",
    "trainer.logger": "Logger",
    "trainer.plugins": "Precision",
    "trainer.profiler": "Profiler",
    "trainer.strategy": "Strategy",
    "model.network": "CTRNetwork",
    "model.loss": "Loss",
    "model.schedule": "LRScheduler",
    "model.table_optimizer": "UpdateRule",
    "model.dense_optimizer": "Optimizer",
    "model.wide_optimizer": "UpdateRule",
}
"""Option -> the base class of its values."""


def _fitting(base: str) -> list[str]:
    """Return the names of the classes that derive from a base."""
    return [known.__name__ for known in OFFERED_CLASSES if base in (parent.__name__ for parent in known.__mro__)]


def classes_of(key: str) -> list[str]:
    """Return the names of the classes that a key takes; none if it takes values of other types."""
    return _fitting(_BASES[key]) if key in _BASES else []


def known_keys(parser: ArgumentParser) -> list[str]:
    """Return the keys of all options that a parser's help lists."""
    return list(dict.fromkeys(re.findall(r"(?m)^  (?:-\w .*, )?--([\w.-]+)", parser.format_help())))

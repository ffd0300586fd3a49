"""The argument parsers of commands other than those that run a Trainer."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from lightning_dlrm.contracts.errors import UserError, joined, listed, nearest, nearest_first
from lightning_dlrm.contracts.terminal import filled, help_width, wrap_around_quotes

_COLUMN = 29
"""Column at which the words of an option begin, as in ``short_help``."""


class HelpParser(argparse.ArgumentParser):
    """An argparse parser without abbreviations that raises UserError; its help has the form of ``short_help``."""

    def __init__(self, **options: Any) -> None:
        # Lines are filled afterwards, without breaks within words.
        formatter = partial(argparse.RawDescriptionHelpFormatter, width=100_000, max_help_position=_COLUMN)
        super().__init__(**{"add_help": False} | options, formatter_class=formatter, allow_abbrev=False)
        if options.get("add_help", True):
            self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def format_help(self) -> str:
        """Return the help: usage, description, options with their words, epilog, filled to the terminal."""
        words = self.description or "", self.epilog or ""
        self.description, self.epilog = "DESCRIPTION", "EPILOG"
        try:
            usage, _, rest = super().format_help().partition("\n\nDESCRIPTION\n\n")
        finally:
            self.description, self.epilog = words
        options = rest.removesuffix("EPILOG\n").strip("\n")
        if self.usage is None:
            names = re.findall(r"(?m)^  ([A-Z]\w*)\b", options)
            usage = " ".join([f"usage: {self.prog}", *names, "[options]"])
        groups = [_group(group) for group in options.split("\n\n")]
        parts = [usage, filled(words[0]), *groups, filled(words[1])]
        return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            UserError: always, with argparse's message in the words of this project.
        """
        words = self._words(message)
        raise UserError(f"{words}{'' if words.endswith('?') else ';'} {self.prog} --help lists the options")

    def _words(self, message: str) -> str:
        if match := re.fullmatch(r"argument (.+?): (.*)", message, re.DOTALL):
            return words_of_fault(long_form(match[1]), match[2])
        if match := re.fullmatch(r"the following arguments are required: (.*)", message):
            return self.words_of_missing([long_form(name) for name in match[1].split(", ")])
        if match := re.fullmatch(r"one of the arguments (.*) is required", message):
            names = match[1].split()
            return f"{joined(names, 'or')} is missing: give one of them"
        return message

    def words_of_missing(self, names: Sequence[str]) -> str:
        """Return which arguments are missing, and how they are given."""
        actions = {name: action for action in self._actions for name in _names(action)}
        first = actions.get(names[0])
        command = self.prog.removeprefix("python -m lightning_dlrm ")
        if first is not None and not first.option_strings and first.choices is not None:
            return f"nothing follows {command}; expected one of {listed(list(map(str, first.choices)), most=40)}"
        usage = " ".join(_usage(name, actions.get(name)) for name in names)
        remedy = f"give {usage}" if names[0].startswith("-") else f"write {command} {usage}"
        return f"{joined(names, 'and')} {'is' if len(names) == 1 else 'are'} missing: {remedy}"


class PlainParser(HelpParser):
    """A parser that refuses unknown arguments. Its subcommands have parsers of the same class.

    Args:
        add_options: adds the options to this parser; called when they are first needed, because it may import much.
        options: options of ``HelpParser``.
    """

    def __init__(self, add_options: Callable[[argparse.ArgumentParser], None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._add_options = add_options
        self._given: Sequence[str] = ()

    def complete(self) -> None:
        """Add the options, if they are not yet there."""
        if self._add_options is not None:
            add_options, self._add_options = self._add_options, None
            add_options(self)

    def format_help(self) -> str:
        self.complete()
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse arguments; refuse unknown ones here, where the options of a subcommand are known."""
        self.complete()
        self._given = sys.argv[1:] if args is None else list(args)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(self.words_of_unknown(rest[0]))
        return found, rest

    def words_of_missing(self, names: Sequence[str]) -> str:
        """Return that an option is unknown, which may be a required one with a typing error, or what is missing."""
        known = self._known()
        options = [word.partition("=")[0] for word in self._given if word.startswith("--") and word != "--"]
        unknown = [name for name in options if name not in known and name != "--debug"]
        return self.words_of_unknown(unknown[0]) if unknown else super().words_of_missing(names)

    def words_of_unknown(self, word: str) -> str:
        return f"unknown {_noun(word)} {word}{nearest(word, self._known())}"

    def _known(self) -> Sequence[str]:
        return re.findall(r"--[\w.-]+", self.format_help())


def join_negative_values(arguments: Sequence[str]) -> list[str]:
    """Return arguments with a value such as ``-1GiB`` joined to its option, because argparse takes it for an option.

    >>> join_negative_values(["plan", "--device-memory", "-1GiB", "--skew", "-4"])
    ['plan', '--device-memory=-1GiB', '--skew', '-4']
    """
    words: list[str] = []
    for argument in arguments:
        is_value = re.match(r"-\.?\d", argument) and not re.fullmatch(r"-\d+|-\d*\.\d+", argument)
        if is_value and words and re.fullmatch(r"--[\w.-]+", words[-1]):
            words[-1] += f"={argument}"
        else:
            words.append(argument)
    return words


def _group(text: str) -> str:
    """Return a group of options or of subcommands with the words of all entries at one column."""
    title, *lines = text.splitlines()
    entries: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith(" " * 10):
            entries[-1] = entries[-1][0], line.strip()
        else:
            name, _, words = line.strip().partition("  ")
            entries.append((re.sub(r"(\S+) \[\1 \.\.\.\]", r"\1...", name), words.strip()))
    column = _COLUMN
    if title == "positional arguments:":
        # The argument for subcommands has no words, and is followed by them.
        has_commands = not entries[0][1] and len(entries) > 1
        title, entries = ("commands:", entries[1:]) if has_commands else ("arguments:", entries)
        column = max(len(name) for name, _ in entries) + 4
    entries = [_with_choices(name, words) for name, words in entries]
    return "\n".join([title, *(part for name, words in entries for part in _entry(name, words, column))])


def _with_choices(name: str, words: str) -> tuple[str, str]:
    """Return the name of an option and its words, with the choices of its value among the words.

    >>> _with_choices("--device {cpu,cuda}", "where to compute (default: cpu)")
    ('--device NAME', 'cpu or cuda: where to compute (default: cpu)')
    """
    if (found := re.search(r"\{(.+)\}$", name)) is None:
        return name, words
    choices = joined(found[1].split(","), "or")
    return f"{name[: found.start()]}NAME", f"{choices}{'' if words.startswith('(') else ':'} {words}".rstrip(": ")


def _entry(name: str, words: str, column: int) -> list[str]:
    """Return the lines of an entry: its name, and its words at a column."""
    lines = [f"{'':{column}}{line}" for line in wrap_around_quotes(words, help_width() - column) or [""]]
    if len(name) + 4 > column:
        return [f"  {name}", *lines]
    return [f"  {name:{column - 2}}{lines[0][column:]}".rstrip(), *lines[1:]]


_KINDS = {"int": "a whole number", "float": "a number"}
"""Type of an option -> what its value is expected to be."""


def words_of_fault(name: str, fault: str) -> str:
    """Return what is wrong with the value of an argument, and what is expected."""
    if match := re.fullmatch(r"invalid choice: (.*?) \(choose from (.*)\)", fault, re.DOTALL):
        value, choices = _unquoted(match[1]), [_unquoted(choice) for choice in match[2].split(", ")]
        return f"{name} is {value}{nearest_first(value, choices, 'expected one of')}"
    if match := re.fullmatch(r"invalid (\w+) value: (.*)", fault, re.DOTALL):
        return (
            f"{name} is {_unquoted(match[2])}; expected {_KINDS.get(match[1], match[1].strip('_').replace('_', ' '))}"
        )
    if match := re.fullmatch(r"expected (one|at least one|at most one|\d+) arguments?", fault):
        needs = {"one": "a value", "at least one": "one value or more", "at most one": "at most one value"}
        return f"{name} needs {needs.get(match[1], f'{match[1]} values')}"
    if match := re.fullmatch(r"not allowed with argument (.*)", fault):
        return f"{long_form(match[1])} and {name} exclude each other: give one of them"
    if match := re.fullmatch(r"ignored explicit argument (.*)", fault, re.DOTALL):
        return f"{name} is given the value {_unquoted(match[1])}, but takes none: write {name} alone"
    return f"{name}: {fault}"


def _names(action: argparse.Action) -> list[str]:
    """Return the names that argparse's messages may give an argument."""
    return [*action.option_strings, action.dest, *([action.metavar] if isinstance(action.metavar, str) else [])]


def long_form(name: str) -> str:
    """Return the long form of an option that has others, such as ``--config`` of ``-c/--config``.

    >>> long_form("-c/--config"), long_form("--trainer.devices/--trainer.devices+"), long_form("a/b")
    ('--config', '--trainer.devices', 'a/b')
    """
    return name.rpartition("/")[2].removesuffix("+") if name.startswith("-") else name


def _usage(name: str, action: argparse.Action | None) -> str:
    """Return an argument as it is typed."""
    if action is None or not action.option_strings or action.nargs == 0:
        return name
    values = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or action.dest.upper(),)
    return " ".join([name, *values])


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _noun(argument: str) -> str:
    return "option" if argument.startswith("-") else "argument"

"""The argument parsers of commands other than those that run a Trainer."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from lightning_dlrm.contracts.errors import KIND_WORDS, UserError, joined, listed, nearest, nearest_first
from lightning_dlrm.contracts.terminal import filled, help_width, wrap_around_quotes

_COLUMN = 29
"""Column at which the words of an option begin, as in ``short_help``."""


class HelpParser(argparse.ArgumentParser):
    """An argparse parser without abbreviations that raises UserError; its help has the form of ``short_help``.

    Args:
        summary: words of this parser in the help of the parser whose subcommand it is.
        options: options of ``argparse.ArgumentParser``.
    """

    def __init__(self, summary: str = "", **options: Any) -> None:
        self.summary = summary
        self.works: Any = None
        """The action of the subcommands."""
        self.sections: dict[str, list[argparse.Action]] = {"arguments": [], "options": []}
        """Section of the help -> its arguments, as they were added."""
        super().__init__(**{"add_help": False} | options, allow_abbrev=False)
        if options.get("add_help", True):
            self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        section = "options" if names[0].startswith("-") else "arguments"
        return _noted(super().add_argument(*names, **options), self.sections[section])

    def add_argument_group(self, *args: Any, **options: Any) -> Any:
        return self._noting(super().add_argument_group(*args, **options))

    def add_mutually_exclusive_group(self, **options: Any) -> Any:
        return self._noting(super().add_mutually_exclusive_group(**options))

    def add_subparsers(self, **options: Any) -> Any:
        self.works = super().add_subparsers(**options)
        return self.works

    def _noting(self, group: Any) -> Any:
        """Return a group of argparse whose arguments are noted in ``sections`` too."""
        add, noted = group.add_argument, self.sections.setdefault(group.title or "options", [])
        group.add_argument = lambda *names, **options: _noted(add(*names, **options), noted)
        return group

    def option_names(self) -> list[str]:
        """Return the names of the options that the help lists."""
        names = (name for actions in self.sections.values() for action in actions for name in action.option_strings)
        return [name for name in names if name.startswith("--")]

    def format_help(self) -> str:
        """Return the help: usage, description, options with their words, epilog, filled to the terminal."""
        works = {} if self.works is None else {name: work.summary for name, work in self.works.choices.items()}
        arguments = [*map(typed_form, self.sections["arguments"]), *([self.works.metavar] if works else [])]
        usage = self.usage or " ".join([self.prog, *arguments, "[options]"])
        parts = [f"usage: {usage}", filled(self.description or ""), _section("commands", works)]
        for title, actions in self.sections.items():
            parts.append(_section(title, {typed_form(action): words_of(action) for action in actions}))
        return "\n\n".join(part.strip("\n") for part in [*parts, filled(self.epilog or "")] if part) + "\n"

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            UserError: always, with argparse's message in the words of this project.
        """
        words = self._words(message)
        raise UserError(f"{words}{'' if words.endswith('?') else ';'} {self.prog} --help lists the options")

    def _words(self, message: str) -> str:
        if match := re.fullmatch(r"argument (.+?): (.*)", message, re.DOTALL):
            if self.works is not None and match[1] == self.works.metavar:
                return self._words_of_no_work(match[2])
            return words_of_fault(long_form(match[1]), match[2])
        if match := re.fullmatch(r"the following arguments are required: (.*)", message):
            return self.words_of_missing([long_form(name) for name in match[1].split(", ")])
        if match := re.fullmatch(r"one of the arguments (.*) is required", message):
            names = match[1].split()
            return f"{joined(names, 'or')} is missing: give one of them"
        return message

    def _words_of_no_work(self, fault: str) -> str:
        """Return what argparse's fault of a choice says of an unknown subcommand."""
        assert self.works is not None
        work = _unquoted(re.sub(r"^invalid choice: | \(choose from .*\)$", "", fault, flags=re.DOTALL))
        command = self.prog.removeprefix("python -m lightning_dlrm ")
        kind = str(self.works.metavar).lower()
        known = nearest_first(work, self.works.choices, f"the {kind}s are")
        return f"{command} has no {kind} {work}{known}"

    def words_of_missing(self, names: Sequence[str]) -> str:
        """Return which arguments are missing, and how they are given."""
        command = self.prog.removeprefix("python -m lightning_dlrm ")
        if self.works is not None and names[0] == self.works.metavar:
            return f"nothing follows {command}; expected one of {listed(list(self.works.choices), most=40)}"
        actions = (action for actions in self.sections.values() for action in actions)
        forms = {name: typed_form(action).rpartition(", ")[2] for action in actions for name in action.option_strings}
        usage = " ".join(forms.get(name, name) for name in names)
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
        known = self.option_names()
        options = [word.partition("=")[0] for word in self._given if word.startswith("--") and word != "--"]
        unknown = [name for name in options if name not in known and name != "--debug"]
        return self.words_of_unknown(unknown[0]) if unknown else super().words_of_missing(names)

    def words_of_unknown(self, word: str) -> str:
        return f"unknown {'option' if word.startswith('-') else 'argument'} {word}{nearest(word, self.option_names())}"


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


def _noted(action: argparse.Action, actions: list[argparse.Action]) -> argparse.Action:
    """Append an argument to a list, unless the help does not list it; return it."""
    actions += [action] * (action.help != argparse.SUPPRESS)
    return action


def typed_form(action: argparse.Action) -> str:
    """Return an argument as it is typed, such as ``-c, --config FILE``."""
    given = action.metavar or ("NAME" if action.choices else action.dest.upper())
    value = given if isinstance(given, str) else " ".join(given)
    names = ", ".join(action.option_strings)
    return names if action.nargs == 0 else f"{names} {value}{'...' * (action.nargs == '+')}".strip()


def words_of(action: argparse.Action) -> str:
    """Return the words of an argument in the help, with its default, and its choices if they are not its metavar."""
    words = (action.help or "") % vars(action)
    if not action.choices or action.metavar is not None:
        return words
    return f"{joined(list(map(str, action.choices)), 'or')}{'' if words.startswith('(') else ':'} {words}".rstrip(": ")


def _section(title: str, entries: Mapping[str, str]) -> str:
    """Return a section of the help with the words of all entries at one column; an empty text if it has no entries."""
    column = max([0, *map(len, entries)]) + 4 if title in ("arguments", "commands") else _COLUMN
    lines = (line for name, words in entries.items() for line in _entry(name, words, column))
    return "\n".join([f"{title}:", *lines]) if entries else ""


def _entry(name: str, words: str, column: int) -> list[str]:
    """Return the lines of an entry: its name, and its words at a column."""
    lines = [f"{'':{column}}{line}" for line in wrap_around_quotes(words, help_width() - column) or [""]]
    if len(name) + 4 > column:
        return [f"  {name}", *lines]
    return [f"  {name:{column - 2}}{lines[0][column:]}".rstrip(), *lines[1:]]


def words_of_fault(name: str, fault: str) -> str:
    """Return what is wrong with the value of an argument, and what is expected."""
    if match := re.fullmatch(r"invalid choice: (.*?) \(choose from (.*)\)", fault, re.DOTALL):
        value, choices = _unquoted(match[1]), [_unquoted(choice) for choice in match[2].split(", ")]
        return f"{name} is {value}{nearest_first(value, choices, 'expected one of')}"
    if match := re.fullmatch(r"invalid (\w+) value: (.*)", fault, re.DOTALL):
        expected = KIND_WORDS.get(match[1], match[1].strip("_").replace("_", " "))
        return f"{name} is {_unquoted(match[2])}; expected {expected}"
    if match := re.fullmatch(r"expected (one|at least one|at most one|\d+) arguments?", fault):
        needs = {"one": "a value", "at least one": "one value or more", "at most one": "at most one value"}
        return f"{name} needs {needs.get(match[1], f'{match[1]} values')}"
    if match := re.fullmatch(r"not allowed with argument (.*)", fault):
        return f"{long_form(match[1])} and {name} exclude each other: give one of them"
    if match := re.fullmatch(r"ignored explicit argument (.*)", fault, re.DOTALL):
        return f"{name} is given the value {_unquoted(match[1])}, but takes none: write {name} alone"
    return f"{name}: {fault}"


def long_form(name: str) -> str:
    """Return the long form of an option that has others, such as ``--config`` of ``-c/--config``.

    >>> long_form("-c/--config"), long_form("--trainer.devices/--trainer.devices+"), long_form("a/b")
    ('--config', '--trainer.devices', 'a/b')
    """
    return name.rpartition("/")[2].removesuffix("+") if name.startswith("-") else name


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value

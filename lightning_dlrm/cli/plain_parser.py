"""The argument parsers of commands other than those that run a Trainer."""

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from lightning_dlrm.contracts.errors import UserError, nearest, nearest_first
from lightning_dlrm.contracts.terminal import filled, help_width


class HelpParser(argparse.ArgumentParser):
    """An argparse parser that takes no abbreviations, and whose help fits the terminal."""

    def __init__(self, **options: Any) -> None:
        formatter = partial(argparse.RawDescriptionHelpFormatter, width=help_width())
        super().__init__(**options, formatter_class=formatter, allow_abbrev=False)

    def format_help(self) -> str:
        """Return the help; its description and epilog fit the terminal."""
        self.description, self.epilog = filled(self.description or ""), filled(self.epilog or "")
        return super().format_help()


class PlainParser(HelpParser):
    """A parser that raises UserError. Its subcommands have parsers of the same class.

    Args:
        add_options: adds the options to this parser; called when they are first needed, because it may import much.
        options: options of ``HelpParser``.
    """

    def __init__(self, add_options: Callable[[argparse.ArgumentParser], None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._add_options = add_options

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
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unknown {_noun(rest[0])} {rest[0]}{nearest(rest[0], self._known())}")
        return found, rest

    def _known(self) -> Sequence[str]:
        return re.findall(r"--[\w.-]+", self.format_help())

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            UserError: always, with the message.
        """
        if match := re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message):
            choices = re.findall(r"'([^']*)'", match[3])
            message = f"{match[1]} is {match[2]}{nearest_first(match[2], choices, 'expected one of')}"
        raise UserError(f"{message}{'' if message.endswith('?') else ';'} {self.prog} --help lists the options")


def _noun(argument: str) -> str:
    return "option" if argument.startswith("-") else "argument"

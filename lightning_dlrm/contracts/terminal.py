"""Text for a terminal: emphasis where it has colours, and lines that fit its width."""

import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TextIO

BOLD, RED = "1", "1;31"

_COMMAND = re.compile(r"(?<!')\b(?:python -m|wandb sync) ")
"""The beginning of a command to copy; one in quotes is a part of its sentence."""
_WORD = re.compile(r"""(?:--[\w.-]+ (?=[^\s-]))?(?:[^\s'"]|'[^']*'|"[^"]*"|['"])+""")
"""A word of a command, or an option and its value; a quote without its end is a character."""

_QUOTED = re.compile(r"(?<!\w)'[^']{1,60}'(?!\w)")
_QUANTITY = re.compile(r"(?<=\d) (?=(?:us|ms|s|min|h|bytes|[KMG]i?B)\b)")
"""The space between a number and its unit."""
_NO_BREAK = "\N{NO-BREAK SPACE}"

_ENTRY = re.compile(r" *\S+(?: \S+)* {2,}(?=\S)")
"""The name of an entry, and the space before its explanation."""


def has_colors(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours; not if NO_COLOR is set: see https://no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def emphasized(text: str, stream: TextIO, style: str = BOLD) -> str:
    """Return text in bold or in a colour if the stream shows it."""
    return f"\x1b[{style}m{text}\x1b[0m" if text and has_colors(stream) else text


def columns(stream: TextIO) -> int:
    """Return the width of the terminal that a stream is; 80 if it is none and COLUMNS is not set."""
    try:
        found = os.get_terminal_size(stream.fileno()).columns
    except (AttributeError, OSError, ValueError):
        found = 0
    return found or shutil.get_terminal_size().columns


def line_width(stream: TextIO) -> int:
    """Return the length of the longest line that a terminal shows without a break; 0 if the stream is no terminal."""
    return columns(stream) - 1 if stream.isatty() else 0


def wrapped(lines: Iterable[str], stream: TextIO | None = None) -> str:
    """Join lines; on a terminal, wrap those that are wider than it, with their own indentation and two spaces more.

    A value that stands after its name and two spaces or more goes on below its beginning.
    A command begins a line of its own and goes on after a backslash, so that it can be copied.

    Args:
        lines: the lines.
        stream: where they are printed; by default standard output.
    """
    width = line_width(stream or sys.stdout)
    return "\n".join(part for line in lines for part in _parts(line, width))


def filled(text: str) -> str:
    """Fill the paragraphs of a help text to ``help_width``.

    An indented line begins an entry of a list, which goes on with the lines that are indented further. A line that ends
    with a colon ends its paragraph. Commands go on after a backslash.
    """
    width = help_width()
    return "\n".join(part for block in _blocks(text) for part in _filled(block, width))


def help_width() -> int:
    """Return the width of help texts: that of the terminal without two characters, as in argparse, but at most 98."""
    return min(shutil.get_terminal_size().columns - 2, 98)


def decimal(value: float, places: int) -> str:
    """Format a score with ``places`` decimals, or with an exponent from 1e6 on, which a fit that diverged may have.

    >>> decimal(0.5, 4), decimal(7.5e28, 4)
    ('0.5000', '7.500e+28')
    """
    return f"{value:.{places}f}" if abs(value) < 1e6 else f"{value:.3e}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1.

    >>> counted(1, "rank"), counted(1200, "table")
    ('1 rank', '1,200 tables')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"


def binary_size(size: float) -> str:
    """Format a number of bytes in the unit that fits it.

    >>> [binary_size(size) for size in (12, 13_925, 1_073_000_000, 2_162_708_692)]
    ['12 bytes', '13.6 KiB', '1,023 MiB', '2.01 GiB']
    """
    for unit, bytes_of_unit in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        amount = size / bytes_of_unit
        if amount >= 1:
            return f"{amount:,.0f} {unit}" if amount >= 100 else f"{amount:.3g} {unit}"
    return f"{size:,.0f} bytes"


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Format rows of text as lines, with the columns ``left`` flush left and the others flush right; columns without
    content below their headers are left out."""
    columns = []
    for number, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        if any(column[1:]):
            columns.append([cell.ljust(width) if number in left else cell.rjust(width) for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def command_line(command: str, *arguments: str) -> str:
    """Return a command as users type it."""
    return f"python -m lightning_dlrm {command} {shlex.join(arguments)}"


def command_after(words: str, command: str) -> str:
    """Return a command on a line of its own below some words, as it fits the terminal."""
    return wrapped([words, f"  {command}"])


def _blocks(text: str) -> list[list[str]]:
    """Return the lines of each paragraph, entry and command of a help text; an empty line is a block of its own."""
    blocks: list[list[str]] = []
    for line in text.splitlines():
        if blocks and line.strip() and _goes_on(blocks[-1], line):
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return blocks


def _goes_on(block: list[str], line: str) -> bool:
    """Whether a line belongs to the block before it."""
    last, indent = block[-1], _indent(block[0])
    if last.endswith("\\"):
        return True
    if not last.strip() or last.endswith(":") or _COMMAND.match(block[0].lstrip()):
        return False
    return _indent(line) > indent or _indent(line) == indent == 0


def _filled(block: list[str], width: int) -> list[str]:
    indent = _indent(block[0])
    words = " ".join([block[0].removesuffix("\\").rstrip(), *(line.strip(" \\") for line in block[1:])])
    if len(words) <= width:
        return [words]
    if _COMMAND.match(words.lstrip()):
        return _parts(words, width)
    if len(block) > 1:
        indent = _indent(block[1])
    elif (entry := _ENTRY.match(words)) is not None:
        indent = entry.end()
    return wrap_around_quotes(words, width, " " * indent)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _parts(line: str, width: int) -> list[str]:
    if not width or len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    if (command := _COMMAND.search(line)) is not None:
        words = line[: command.start()].rstrip()
        before, indent = (_parts(words, width), indent) if words else ([], indent[:-2])
        return [*before, *_command_parts(line[command.start() :], width, indent)]
    if (entry := _ENTRY.match(line)) is not None and entry.end() <= width // 2:
        indent = " " * entry.end()
    return wrap_around_quotes(line, width, indent)


def wrap_around_quotes(line: str, width: int, indent: str = "") -> list[str]:
    """Wrap a line; text in quotes, which may be a value to copy, and a number with its unit stay in one piece."""
    kept = _QUOTED.sub(lambda quoted: quoted[0].replace(" ", _NO_BREAK), _QUANTITY.sub(_NO_BREAK, line))
    parts = textwrap.wrap(kept, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [part.replace(_NO_BREAK, " ") for part in parts]


def _command_parts(command: str, width: int, indent: str) -> list[str]:
    parts = [indent]
    for word in _WORD.findall(command):
        if len(parts[-1]) + len(word) > width - len(" \\") and parts[-1].strip():
            parts[-1] += "\\"
            parts.append(f"{indent}  ")
        parts[-1] += f"{word} "
    return [part.rstrip() for part in parts]

"""Text for a terminal: emphasis where it has colours, and lines that fit its width."""

import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO

BOLD, RED = "1", "1;31"


def has_colors(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours; not if NO_COLOR is set: see https://no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def emphasized(text: str, stream: TextIO, style: str = BOLD) -> str:
    """Return text in bold or in a colour if the stream shows it."""
    return f"\x1b[{style}m{text}\x1b[0m" if text and has_colors(stream) else text


def wrapped(lines: Iterable[str], stream: TextIO | None = None) -> str:
    """Join lines; on a terminal, wrap those that are wider than it, with their own indentation and two spaces more.

    A command goes on after a backslash, so that it can be copied.

    Args:
        lines: the lines.
        stream: where they are printed; by default standard output.
    """
    stream = stream or sys.stdout
    width = shutil.get_terminal_size().columns - 1 if stream.isatty() else 0
    return "\n".join(part for line in lines for part in _parts(line, width))


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


def command_after(words: str, command: str) -> str:
    """Return a command on a line of its own below some words, as it fits the terminal."""
    return wrapped([words, f"  {command}"])


def _parts(line: str, width: int) -> list[str]:
    if not width or len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    if line.lstrip().startswith("python -m "):
        parts = [indent[:-2]]
        for word in shlex.split(line, posix=False):
            if len(parts[-1]) + len(word) > width - len(" \\") and parts[-1].strip():
                parts[-1] += "\\"
                parts.append(indent)
            parts[-1] += f"{word} "
        return [part.rstrip() for part in parts]
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)

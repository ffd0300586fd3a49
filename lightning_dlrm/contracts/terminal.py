"""Text for a terminal: emphasis where it has colours, and lines that fit its width."""

import os
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

    Commands are not wrapped, because they are to be copied.

    Args:
        lines: the lines.
        stream: where they are printed; by default standard output.
    """
    stream = stream or sys.stdout
    width = shutil.get_terminal_size().columns - 1 if stream.isatty() else 0
    return "\n".join(part for line in lines for part in _parts(line, width))


def _parts(line: str, width: int) -> list[str]:
    if not width or len(line) <= width or "python -m " in line:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)

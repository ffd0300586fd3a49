"""The commands about data; their options and work live in ``datamodules``."""

import argparse
from collections.abc import Callable

from datamodules.generate import command as generate
from datamodules.preprocess import command as preprocess

Run = Callable[[argparse.Namespace], int]


def add_arguments(command: str, parser: argparse.ArgumentParser) -> Run:
    """Adds a command's options to a parser and returns what runs it."""
    add, run = {
        "preprocess": (preprocess.add_arguments, preprocess.run),
        "inspect": (preprocess.add_inspect_arguments, preprocess.run_inspect),
        "generate": (generate.add_arguments, generate.run),
    }[command]
    add(parser)
    return run

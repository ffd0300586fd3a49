"""The commands that need no Trainer; their options and work live elsewhere."""

import argparse
import importlib
from collections.abc import Callable, Sequence

Run = Callable[[argparse.Namespace], int]

# Imported when asked for: preprocessing starts without loading what benchmarks need.
_COMMANDS = {
    "preprocess": ("datamodules.preprocess.command", "add_arguments", "run"),
    "inspect": ("datamodules.preprocess.command", "add_inspect_arguments", "run_inspect"),
    "generate": ("datamodules.generate.command", "add_arguments", "run"),
    "checkpoint": ("lightning_dlrm.cli.checkpoint", "add_arguments", "run"),
    "dashboard": ("lightning_dlrm.cli.dashboard", "add_arguments", "run"),
    "bench": ("lightning_dlrm.bench.command", "add_arguments", "run"),
}


def begin(arguments: Sequence[str]) -> None:
    """Begins what a program's command line needs beside this process, before that loads anything."""
    if arguments[:1] == ["preprocess"] and "--input" in arguments:
        from datamodules.preprocess.workers import serve_processes

        serve_processes()


def add_arguments(command: str, parser: argparse.ArgumentParser) -> Run:
    """Adds a command's options to a parser and returns what runs it."""
    module_name, add, run = _COMMANDS[command]
    module = importlib.import_module(module_name)
    getattr(module, add)(parser)
    runs: Run = getattr(module, run)
    return runs

"""Commands without a Trainer: the module with the options and the function of each."""

import argparse
import importlib
from collections.abc import Callable, Sequence

Run = Callable[[argparse.Namespace], int]

# Modules are imported on use, so that each command loads only what it needs.
_COMMANDS = {
    "preprocess": ("datamodules.preprocess.command", "add_arguments", "run"),
    "inspect": ("datamodules.preprocess.command", "add_inspect_arguments", "run_inspect"),
    "generate": ("datamodules.generate.command", "add_arguments", "run"),
    "checkpoint": ("lightning_dlrm.cli.checkpoint", "add_arguments", "run"),
    "dashboard": ("lightning_dlrm.cli.dashboard", "add_arguments", "run"),
    "bench": ("lightning_dlrm.bench.command", "add_arguments", "run"),
}


def begin(arguments: Sequence[str]) -> None:
    """Start the worker processes of a command, before this process loads anything."""
    if arguments[:1] == ["preprocess"] and "--input" in arguments:
        from datamodules.preprocess.workers import serve_processes

        serve_processes()


def add_arguments(command: str, parser: argparse.ArgumentParser) -> Run:
    """Add a command's options to a parser; return the function that runs it."""
    module_name, add, run = _COMMANDS[command]
    module = importlib.import_module(module_name)
    getattr(module, add)(parser)
    runs: Run = getattr(module, run)
    return runs

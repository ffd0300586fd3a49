"""The options of ``compare``; ``--help`` starts without torch."""

import argparse
from typing import Literal, get_args

from lightning_dlrm.cli.plain_parser import HelpParser
from lightning_dlrm.cli.short_help import TRUST_HELP

Split = Literal["test", "validation"]

DESCRIPTION = """\
Train configurations with several seeds, or take finished runs, and show which is better.

examples:
  python -m lightning_dlrm compare --config figure5.yaml --config figure5/small.yaml --seeds 1,2 --output runs/small
  python -m lightning_dlrm compare --config figure5.yaml --config criteo_kaggle.yaml --data.path DIR \\
      --output runs/figure5
  python -m lightning_dlrm compare runs/dlrm-1 runs/dlrm-2 runs/dcn-1 runs/dcn-2 --output runs/dlrm_vs_dcn

An experiment's YAML names arms (configurations), seeds, and compared settings, as the shipped figure5.yaml does. Other
--config files and options such as --data.path or --trainer.max_steps apply to all its runs. Finished runs are not
repeated; others continue from their newest checkpoint.

The folder after --output gets report.html, its figures as PNG and report.json; for an experiment also runs/ and logs/.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; what it does not know are run folders, or options for all runs."""
    parser = HelpParser(
        prog="python -m lightning_dlrm compare",
        usage="python -m lightning_dlrm compare --config EXPERIMENT.yaml [--config OVERLAY.yaml ...]\n"
        "           --output DIR [options]\n"
        "       python -m lightning_dlrm compare RUN RUN ... --output DIR [options]",
        description=DESCRIPTION,
    )
    parser.add_argument("-c", "--config", action="append", help="an experiment's YAML, then overlays for all its runs")
    parser.add_argument("--output", default=None, help="folder for the report, and for the runs of an experiment")
    parser.add_argument("--seeds", default=None, help="seeds instead of those of the experiment, such as 1,2,3")
    parser.add_argument("--parallel", default=None, help="runs at a time (default: one for each GPU; one on a CPU)")
    parser.add_argument("--split", choices=get_args(Split), default="test", help="which samples are scored")
    parser.add_argument(
        "--group",
        metavar="COLUMN",
        help="also report the mean AUC over the groups of a kept column, such as the user (default: data.group of the "
        "runs)",
    )
    parser.add_argument("--force", action="store_true", help="compare runs of different data, with warnings")
    parser.add_argument(
        "--discard-checkpoints",
        action="store_true",
        help="remove a run's checkpoints once it is scored; at the paper's size they take 4 to 8 GiB a run",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, show the planned comparison, and exit"
    )
    # Only for the list in --help: ``take_trust`` has taken it.
    parser.add_argument("--trust", metavar="MODULE", help=TRUST_HELP)
    return parser

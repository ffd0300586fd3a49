"""The options of ``compare``; ``--help`` starts without torch."""

from typing import Literal, get_args

from lightning_dlrm.cli.plain_parser import HelpParser
from lightning_dlrm.cli.short_help import TRUST_HELP

Split = Literal["test", "validation"]

DESCRIPTION = """\
Train configurations with several seeds, or take finished runs, and show which
is better.

examples:
  python -m lightning_dlrm compare --config figure5.yaml \\
      --config figure5/small.yaml --seeds 1,2 --output runs/small
  python -m lightning_dlrm compare --config figure5.yaml \\
      --config criteo_kaggle.yaml --data.path DIR --output runs/figure5
  python -m lightning_dlrm compare runs/dlrm-1 runs/dlrm-2 \\
      runs/dcn-1 runs/dcn-2 --output runs/dlrm_vs_dcn

An experiment is a YAML that names configurations (arms), seeds, and the settings in which the arms may differ, as the
shipped figure5.yaml does. After an interruption the same command continues. RUN is the folder of a finished fit;
runs that differ in their seed alone are one arm.

The folder after --output gets report.html, its figures and report.json; for an experiment also runs/ and logs/.
"""

EPILOG = """\
Other options, such as --data.path DIR or --trainer.max_steps N, apply to all runs of an experiment; 'fit --help.all'
lists them. docs/compare.md explains the result.
"""


def make_parser() -> HelpParser:
    """Return the parser; what it does not know are run folders, or options for all runs."""
    parser = HelpParser(
        prog="python -m lightning_dlrm compare",
        usage="python -m lightning_dlrm compare --config FILE... --output DIR\n"
        "       python -m lightning_dlrm compare RUN RUN... --output DIR",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    training = parser.add_argument_group("an experiment")
    training.add_argument(
        "-c", "--config", action="append", metavar="FILE", help="the experiment, then configurations for all its runs"
    )
    training.add_argument("--seeds", metavar="LIST", help="seeds in place of the experiment's, such as 1,2,3")
    training.add_argument(
        "--parallel", metavar="N", help="runs at the same time (default: one for each GPU; one on a CPU)"
    )
    training.add_argument(
        "--discard-checkpoints", action="store_true",
        help="remove the checkpoints of a run that is scored (4 to 8 GiB a run at the paper's size)",
    )  # fmt: skip
    # Only for the list in --help: ``take_trust`` has taken it.
    training.add_argument("--trust", metavar="MODULE", help=TRUST_HELP)
    finished = parser.add_argument_group("finished runs")
    finished.add_argument(
        "--force", action="store_true", help="compare runs of different data, with a warning on every figure"
    )
    result = parser.add_argument_group("the result")
    result.add_argument("--output", metavar="DIR", help="folder of the report, and of the runs of an experiment")
    result.add_argument(
        "--split", metavar="NAME", choices=get_args(Split), default="test",
        help="score the samples of test (default) or validation",
    )  # fmt: skip
    result.add_argument(
        "--group", metavar="COLUMN",
        help="also report the AUC by group of a kept column, such as the user (default: data.group of the runs)",
    )  # fmt: skip
    result.add_argument(
        "--dry-run", action="store_true", help="check everything, show the planned comparison, and exit"
    )
    return parser

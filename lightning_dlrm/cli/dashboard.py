"""``dashboard``: save the W&B workspace and report of a project, or of a group such as a comparison."""

import argparse
from pathlib import Path

from lightning_dlrm.tracking.dashboard import Dashboard, publish, write_page

DESCRIPTION = """\
Save a workspace and a report of a project's or a group's runs at Weights & Biases (W&B).

examples:
  python -m lightning_dlrm dashboard
  python -m lightning_dlrm dashboard --project ads --entity team --group figure5 --comparison --by-tag
  python -m lightning_dlrm dashboard --output dashboard.html

Needs: pip install 'lightning-dlrm[dashboards]'; without --output, also an account of W&B ('wandb login').
"""
DETAILS = """\
Each call makes a new workspace and a new report, with the sections quality, training, norms, speed, system, GPUs and
parallel. The x axis is the number of samples trained on; panels over time have the time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dashboard``."""
    parser.description, parser.epilog = DESCRIPTION, DETAILS
    parser.add_argument(
        "--project", default="lightning_dlrm", metavar="NAME", help="W&B project (default: %(default)s)"
    )
    parser.add_argument("--entity", default="", metavar="NAME", help="user or team (default: that of the account)")
    parser.add_argument(
        "--group", metavar="NAME", help="only the runs of this group (default: all runs of the project)"
    )
    parser.add_argument("--comparison", action="store_true", help="add a section with the results of compare")
    parser.add_argument(
        "--by-tag",
        action="store_true",
        help="the mean and the range of runs with equal tags (compare tags each run of an experiment with its arm)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="list the panels of the dashboard, without data, on an HTML page; save nothing at W&B",
    )


def run(options: argparse.Namespace) -> int:
    """Save the workspace and the report, and print their addresses; or write a page that lists their panels."""
    dashboard = Dashboard(
        project=options.project,
        entity=options.entity,
        group=options.group,
        comparison=options.comparison,
        by_tag=options.by_tag,
    )
    if options.output is not None:
        write_page(dashboard, options.output)
        print(f"wrote {options.output}")
        return 0
    saved = publish(dashboard)
    for name, address in saved.items():
        print(f"{name:10s} {address}")
    return 0

"""``dashboard``: save the W&B workspace and report of a project, or of a group such as a comparison."""

import argparse

from lightning_dlrm.tracking.dashboard import Dashboard, publish

EXAMPLES = """\
examples:
  python -m lightning_dlrm dashboard
  python -m lightning_dlrm dashboard --project ads --entity team --group figure5

Each call makes a new workspace and a new report, with sections comparison (results of compare), quality, training,
speed, system and parallel. The x axis is the number of samples trained on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dashboard``."""
    parser.epilog = EXAMPLES
    parser.add_argument("--project", default="lightning_dlrm", help="W&B project (default: %(default)s)")
    parser.add_argument("--entity", default="", help="user or team; by default the account's own")
    parser.add_argument("--group", default=None, help="only the runs of this group; by default all of the project")


def run(options: argparse.Namespace) -> int:
    """Save the workspace and the report, and print their addresses."""
    saved = publish(Dashboard(project=options.project, entity=options.entity, group=options.group))
    for name, address in saved.items():
        print(f"{name:10s} {address}")
    return 0

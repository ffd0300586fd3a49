"""``--KEY.help CLASS``: checked, and completed to what jsonargparse wants."""

import itertools
import re
from collections.abc import Sequence

from lightning_dlrm.cli.mistakes import classes_of
from lightning_dlrm.contracts.errors import require

_OF_SETTINGS = re.compile(
    r"--(?:published|model\.averaging|model\.regularization|(?:model\.network|data)\.[\w.]+)\.help"
)
"""Help of what is no class, but has keys."""


def name_class_of_help(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which help for an option of the network or the data, such as ``--model.network.tables.help``,
    names their class first, as jsonargparse wants it: the class that is given as an option, or DLRM or Criteo.

    Help of a kind of class, such as ``--model.network.help``, prints the classes of this kind and ends the command.

    Raises:
        UserError: a class is given for help of what is no class.
    """
    for argument, value in itertools.pairwise([*arguments, "--"]):
        option, equals, _ = argument.partition("=")
        has_class = bool(equals) or not value.startswith("-")
        require(option != "--trainer.accelerator.help", "trainer.accelerator has no classes; expected auto, cpu or gpu")
        require(not has_class or not _OF_SETTINGS.fullmatch(option), f"{option} takes no class; write {option} alone")
        if not has_class and option.endswith(".help") and (names := classes_of(option[2:-5])):
            print(f"{option} CLASS lists the options of a class. Classes:")
            print("\n".join(f"  {name}" for name in names))
            raise SystemExit(0)
    named: list[str] = []
    for argument in arguments:
        inner = re.fullmatch(r"--(model\.network|data)\.(?:init_args\.)?([\w.]+)\.help", argument)
        if inner is not None and f"--{inner[1]}.help" not in arguments:
            given = [other.partition("=")[2] for other in arguments if other.startswith(f"--{inner[1]}=")]
            named += [f"--{inner[1]}.help", *(given[-1:] or [{"data": "Criteo"}.get(inner[1], "DLRM")])]
            if inner[1] == "data":
                # Help of a class of data lists the keys of its settings, such as demo, too.
                continue
            argument = f"--{inner[1]}.{inner[2]}.help"
        named.append(argument)
    return named

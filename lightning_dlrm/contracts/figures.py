"""Files of figures: a check before long work, and their error."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dlrm.contracts.disk import write_fault
from lightning_dlrm.contracts.errors import UserError, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHOICE = "another --plot FILE"


def check_figure_file(path: Path) -> None:
    """Check before long work that a figure can be written.

    Raises:
        UserError: the file's suffix is not that of a figure, or there is no such folder.
    """
    require(
        path.suffix in (".png", ".svg", ".pdf"),
        f"{path} does not have the suffix of a figure; give it one of .png, .svg, .pdf",
    )
    parent = path.absolute().parent
    require(parent.is_dir(), f"cannot write {path}: there is no folder {path.parent}; make it, or choose {_CHOICE}")


def save_figure(figure: "Figure", path: Path, dpi: int) -> None:
    """Write a figure; its suffix is the format.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise UserError(write_fault(path, error, _CHOICE)) from error

"""Contract: a figure that cannot be written is refused in one line, before long work if that can be known."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.figures import check_figure_file, save_figure


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plan.jpgx", "plan.jpgx does not have the suffix of a figure; give it one of .png, .svg, .pdf"),
        ("plan", "plan does not have the suffix of a figure"),
        ("no/plan.png", "cannot write no/plan.png: there is no folder no; make it, or choose another --plot FILE"),
    ],
)
def test_refused_before_long_work(name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_figure_file(Path(name))
    assert str(error.value).startswith(said)


def test_refused_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "plan.png").mkdir()
    with pytest.raises(UserError, match="it is a folder; choose another --plot FILE"):
        save_figure(Figure(), tmp_path / "plan.png", 50)

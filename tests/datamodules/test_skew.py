"""Contract: in the figure of ``inspect --plot`` every mark is seen, and axes of small tables have readable numbers."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from datamodules.preprocess.skew import draw, skew_of
from lightning_dlrm.contracts.schema import Column


def test_marks_of_small_tables_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    skews = [
        skew_of(Column(name=f"C{rows}", role="categorical", cardinality=rows), np.full(rows, 100)) for rows in (1, 2, 6)
    ]
    draw(skews, "Tables", tmp_path / "figure.png")
    figures[0].canvas.draw()
    above, below = figures[0].axes
    marks = [line.get_xydata() for line in above.lines]
    assert [len(of_share) for of_share in marks] == [3, 3, 3]
    places = {tuple(np.round(place, 3)) for of_share in marks for place in of_share}
    assert len(places) == 9, "each table has three marks, at different heights"
    for axes in (above, below):
        texts = [label.get_text() for label in axes.get_xticklabels(which="both")]
        assert not any("times" in text for text in texts)

"""Contract: ReduceOnPlateau is FuxiCTR's rule, at every evaluation of ``fuxictr_plateau.json``."""

import json
from typing import Any

import pytest

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.plateau import ReduceOnPlateau
from tests.parity.folders import cases

CASES: dict[str, dict[str, Any]] = {}
for path in cases("fuxictr_plateau*.json"):
    CASES |= json.loads(path.read_text())["cases"]
if not CASES:
    pytest.skip("fuxictr_plateau.json lies in ../shared/golden_fuxictr, which is not here", allow_module_level=True)


def number(value: Any) -> float:
    """JSON has no NaN and no infinity; they are text."""
    return float(value)


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    case = CASES[name]
    rule = ReduceOnPlateau(
        case["monitor"],
        case["monitor_mode"],
        patience=case["early_stop_patience"],
        factor=case["lr_factor"] if case["reduce_lr_on_plateau"] else 1.0,
        min_rate=case["min_lr"],
        min_delta=case["min_delta"],
    )
    rate = case["lr"]
    for row in case["rows"]:
        assert rate == row["lr_before"]
        # A resumed fit has a new object with the saved state.
        saved, rule = rule, ReduceOnPlateau(
            case["monitor"], case["monitor_mode"], rule.patience, rule.factor, rule.min_rate, rule.min_delta
        )  # fmt: skip
        rule.load_state_dict(saved.state_dict())
        rule.observe({metric: number(value) for metric, value in row["metrics"].items()}, [rate])
        [rate] = rule.rates
        found = (rate, rule.improved, rule.count, rule.best, rule.stops)
        expected = (row["lr_after"], row["saved"], row["stopping_steps"], number(row["best"]), row["stop"])
        assert found == pytest.approx(expected, rel=1e-15, abs=0, nan_ok=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "best"}, "mode 'best' is not one of max, min"),
        ({"patience": 0}, "patience is 0; expected 1 or more"),
        ({"factor": 0.0}, "factor is 0.0; expected a number above 0, at most 1"),
        ({"min_rate": -1.0}, "min_rate is -1.0 and min_delta 1e-06; expected numbers of 0 or more"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReduceOnPlateau(**arguments)

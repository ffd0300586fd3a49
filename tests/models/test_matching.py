"""Contract: ``params --match`` finds the widths that come nearest in their proportions, whatever is tried beside
them, and writes a configuration that costs what was said."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.configs import find_config
from lightning_dlrm.cli.params import COSTS, count, describe, match
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.dcn import DCN
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.models.network import CTRNetwork, ModelSize, model_size
from tests.toy import TABLES, toy_dlrm, toy_module, toy_schema


def test_operations_that_are_not_known_are_no_zeros() -> None:
    class Own(DLRM):
        multiply_adds = CTRNetwork.multiply_adds

        def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
            return super().score(torch.tensor(dense_BI.tolist()), vectors)

    own = toy_module(partial(Own, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[6]))
    assert own.size.flops_per_sample_forward == 0 and count(own)["flops_per_sample_training"] is None
    with pytest.raises(UserError, match="--by flops"):
        match(toy_module(), {"bottom_mlp": [8, 4], "top_mlp": [6]}, own.size, "flops")


@pytest.mark.parametrize("by", COSTS)
def test_no_other_width_comes_nearer(by: str) -> None:
    def make(features: Features, seed: int, **widths: list[int]) -> DCN:
        return DCN(features, seed, **{"embedding_dim": 4, "cross_layers": 2, "deep": [12, 5], **widths})

    goal = toy_module(toy_dlrm).size
    widths, found = match(toy_module(make), {"deep": [12, 5]}, goal, by)
    cost = COSTS[by]

    def distance(widest: int) -> int:
        with torch.device("meta"):
            size = model_size(make(toy_schema().features, 1, deep=[widest, max(1, round(5 * widest / 12))]))
        return abs(cost(size) - cost(goal))

    assert abs(cost(found) - cost(goal)) == min(map(distance, range(1, 60)))
    assert abs(cost(found) - cost(goal)) == distance(widths["deep"][0])
    assert list(TABLES) == list(toy_schema().features.tables)


def test_the_written_configuration_costs_what_was_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "matched.yaml"
    arguments = ["params", "--match", "dlrm.yaml", "--to", "dcn.yaml", "--by", "flops", "--output", str(output)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert main(["params", "--config", str(output), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    line = next(line for line in said.splitlines() if line.startswith("flops"))
    assert line.split()[1] == f"{figures['flops_per_sample_forward']:,}"
    assert line.split()[2] == "713,106" and line.split()[3] == f"{figures['flops_per_sample_forward'] - 713_106:+,}"
    assert abs(figures["flops_per_sample_forward"] - 713_106) < 0.01 * 713_106
    assert figures["tables"] == 540_201_232
    network = yaml.safe_load(output.read_text())["model"]["network"]["init_args"]
    text = " ".join(output.read_text().replace("#", "").split())
    for key in ("bottom_mlp", "top_mlp"):
        former = yaml.safe_load(find_config("dlrm.yaml").read_text())["model"]["network"]["init_args"][key]
        words = f"{key}: {network[key]}, the nearest widths in the proportions of {former}"
        assert words in text and words in said
    assert network["bottom_mlp"][-1] == network["embedding_dim"] == 16
    assert main(arguments) == 2
    assert "exists; choose another --output" in capsys.readouterr().err


def test_what_cannot_be_matched_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refusal(*arguments: str) -> str:
        assert main(["params", *arguments]) == 2
        return capsys.readouterr().err

    output = ["--output", str(tmp_path / "x.yaml")]
    assert "--match needs --to" in refusal("--match", "dcn.yaml", *output)
    assert "--match needs --output" in refusal("--match", "dcn.yaml", "--to", "dlrm.yaml")
    message = refusal("--match", "dcn.yaml", "--to", "dlrm.yaml", "--model.network.embedding_dim=8", *output)
    assert "--match does not write --model.network.embedding_dim" in message
    assert "--by size is not one of" in refusal("--match", "dcn.yaml", "--to", "dlrm.yaml", "--by", "size", *output)
    message = refusal("--match", "matrix_factorization.yaml", "--to", "dlrm.yaml", *output)
    assert "MatrixFactorization has no hidden layers" in message
    assert "--json has no effect with --match" in refusal("--match", "dcn.yaml", "--to", "dlrm.yaml", "--json", *output)
    far = refusal("--match", "dcn.yaml", "--to", "logistic_regression.yaml", *output)
    assert far.startswith("error: dcn.yaml cannot match logistic_regression.yaml by dense: the nearest widths ")
    assert "only differences up to 5% are a match; choose another --by" in far and far.count("\n") == 1
    for option in ("--to=dcn.yaml", "--by=total", "--output=x.yaml"):
        said = f"{option.partition('=')[0]} has no effect without --match"
        assert said in refusal("--config", "dlrm.yaml", option)
    assert not list(tmp_path.iterdir())


def test_overlays_belong_to_the_configurations(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    overlay = tmp_path / "over.yaml"
    overlay.write_text(
        "model:\n  network:\n    init_args:\n      cross_layers: 2\n"
        "  dense_optimizer:\n    class_path: SGD\n    init_args: {learning_rate: 0.5}\n"
    )
    output = tmp_path / "matched.yaml"
    arguments = ["--match", "dcn.yaml", str(overlay), "--to", "dlrm.yaml", "small.yaml", "--by", "dense"]
    assert main(["params", *arguments, "--output", str(output)]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("dense"))
    assert main(["params", "--config", str(output), "--json"]) == 0
    assert said.split()[1] == f"{json.loads(capsys.readouterr().out)['dense']:,}"
    model = yaml.safe_load(output.read_text())["model"]
    assert model["network"]["init_args"]["cross_layers"] == 2
    assert model["dense_optimizer"] == {"class_path": "SGD", "init_args": {"learning_rate": 0.5}}
    assert f"dcn.yaml + {overlay}" in output.read_text()


def test_columns_stay_apart_however_large_the_numbers() -> None:
    small, large = (ModelSize(tables=0, dense=dense, flops_per_sample_forward=dense) for dense in (2, 123_456_789_012))
    header, *lines = describe("a", "b", large, small, "total")
    assert all(len(line.split()) == 5 + line.endswith("matched") and len(line) <= 90 for line in lines[1:])
    assert "in percent" in header
    near, far = (ModelSize(tables=0, dense=dense, flops_per_sample_forward=1) for dense in (1_000_000, 1_000_001))
    _, _, total, _, flops = describe("a", "b", near, far, "dense")
    assert total.endswith("under 0.001%") and flops.endswith(" 0.000%")


def test_the_batch_of_the_gradients_is_named(capsys: pytest.CaptureFixture) -> None:
    arguments = ["params", "--config", "dlrm.yaml", "--data.batch_size", "512"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("DLRM of dlrm.yaml on demo data, batch 512\n\nparameters in tables ")
    assert "\nparameters in total " in said and "Gradients are those of a batch of 512 samples" in said
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] == 512

"""Contract: a file that facebookresearch/dlrm saved becomes a checkpoint that gives its probabilities."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from datamodules.criteo import Criteo
from datamodules.generate.demo import DemoSettings
from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.importing import read_published
from lightning_dlrm.contracts.errors import UserError

DEMO = DemoSettings(train_rows=3000, validation_rows=500, test_rows=500, max_table_rows=50)
OPTIONS = [
    "--config", "dlrm.yaml", "--model.network.embedding_dim", "4", "--model.network.bottom_mlp", "[6, 4]",
    "--model.network.top_mlp", "[5]", "--data.demo.train_rows", "3000", "--data.demo.validation_rows", "500",
    "--data.demo.test_rows", "500", "--data.demo.max_table_rows", "50",
]  # fmt: skip


class Published(nn.Module):
    """The published model, as far as its file goes: the same names, and the formula in plain torch."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(n, 4, mode="sum") for n in rows)
        vectors = 1 + len(rows)
        self.bot_l = nn.Sequential(nn.Linear(13, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU())
        width = 4 + vectors * (vectors - 1) // 2
        self.top_l = nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        x = self.bot_l(dense)
        vectors = torch.stack([x, *(table(ids[:, t : t + 1]) for t, table in enumerate(self.emb_l))], 1)
        products = vectors @ vectors.transpose(1, 2)
        pairs = [products[:, i, j] for i in range(vectors.shape[1]) for j in range(i)]
        return self.top_l(torch.cat([x, torch.stack(pairs, 1)], 1)).squeeze(1)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Published, Path]:
    torch.manual_seed(0)
    model = Published(list(Criteo("demo", demo=DEMO).schema.features.table_rows))
    path = tmp_path_factory.mktemp("published") / "model.pt"
    torch.save(
        {
            "state_dict": model.state_dict(),
            "nepochs": 1,
            "epoch": 0,
            "iter": 7,
            "train_loss": np.float32(0.5),
            "total_loss": np.float64(3.5),
            "test_acc": 0.75,
            "opt_state_dict": torch.optim.SGD(model.parameters(), lr=0.1).state_dict(),
        },
        path,
    )
    return model, path


def test_probabilities_are_those_of_the_file(
    published: tuple[Published, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, path = published
    checkpoint, run = tmp_path / "imported", tmp_path / "run"
    assert main(["checkpoint", "import", str(path), *OPTIONS, "--output", str(checkpoint)]) == 0
    assert main(["predict", *OPTIONS, "--ckpt_path", str(checkpoint), "--run_dir", str(run)]) == 0
    found = pq.read_table(run / "predictions.parquet")
    data = Criteo("demo", demo=DEMO)
    data.prepare_data()
    data.setup("predict")
    with torch.no_grad():
        expected = torch.cat([model(batch.dense, batch.ids.values.long()) for batch in data.predict_dataloader()])
    assert len(expected) == 500 and expected.std() > 1e-3
    np.testing.assert_allclose(found["probability"].to_numpy(), expected.numpy(), atol=1e-6)
    assert main(["fit", *OPTIONS, "--ckpt_path", str(checkpoint), "--run_dir", str(tmp_path / "fit")]) == 2
    assert "has no optimizer state, so a fit cannot continue from it" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(
    published: tuple[Published, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, path = published

    def refusal(*arguments: str) -> str:
        assert main(["checkpoint", *arguments]) == 2
        return capsys.readouterr().err

    target = ["--output", str(tmp_path / "out")]
    assert "bot_l.0.bias is (6,)" in refusal(
        "import", str(path), *OPTIONS, "--model.network.bottom_mlp", "[7, 4]", *target
    )
    assert "emb_l.0.weight is (50, 4)" in refusal(
        "import", str(path), *OPTIONS, "--data.demo.max_table_rows", "40", *target
    )
    dcn = ["--config", "dcn.yaml", "--config", "small.yaml"]
    assert "makes a DCN" in refusal("import", str(path), *dcn, *target)
    assert "give the new checkpoint folder" in refusal("import", str(path), *OPTIONS)
    assert "comes first" in refusal("import", *OPTIONS, *target)
    assert "there is no file" in refusal("import", str(tmp_path / "none.pt"), *OPTIONS, *target)
    assert f"{tmp_path} exists" in refusal("import", str(path), *OPTIONS, "--output", str(tmp_path))
    assert not (tmp_path / "out").exists()


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_no_code_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": Harmful()}}, "bad.pt")
    Path("text.pt").write_text("no tensors")
    torch.save([1, 2], "list.pt")
    for name, message in {"bad.pt": "not a file of", "text.pt": "not a file of", "list.pt": "no state_dict"}.items():
        with pytest.raises(UserError, match=message):
            read_published(Path(name))
    assert not Path("harm").exists()

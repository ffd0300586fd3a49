"""Contract: whatever the tables' settings, a column's vector is what loops over its ids give, with
true gradients; and rows lie in plain tables with names of their own."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tables.embeddings import Embeddings, MixedDimensions, QuotientRemainder, TableSettings
from lightning_dlrm.tables.lookup import EmbeddingTables

COLUMNS = {"A": 4, "B": 30, "C": 7}
BAGS = [[[1], [29, 3, 3], []], [[], [7], [6, 0]], [[0, 3], [], [5]]]
FACTORS = [[[0.5], [1.0, 2.0, -1.0], []], [[], [3.0], [1.0, 0.5]], [[1.0, 1.0], [], [0.25]]]


def as_ids(weighted: bool = False) -> SparseIds:
    flat = [bag for sample in BAGS for bag in sample]
    factors = [f for sample in FACTORS for bag in sample for f in bag]
    return SparseIds(
        values=torch.tensor([i for bag in flat for i in bag], dtype=torch.int32),
        tables=3,
        offsets=torch.tensor([0, *itertools.accumulate(map(len, flat))]),
        weights=torch.tensor(factors, dtype=torch.float64) if weighted else None,
    )


def one_hot() -> SparseIds:
    return SparseIds(values=torch.tensor([[1, 29, 0], [3, 8, 6]], dtype=torch.int32), tables=3)


def rows_of(embeddings: Embeddings) -> dict[str, Tensor]:
    """Table name -> its rows, as a leaf that gradients can be taken of."""
    lookups = [group.lookup for group in embeddings.groups]
    if embeddings.pooling_weights is not None:
        lookups.append(embeddings.pooling_weights)
    return {
        piece.name: piece.of(lookup.weight).detach().clone().requires_grad_()
        for lookup in lookups
        for piece in lookup.pieces
    }


def by_loops(embeddings: Embeddings, rows: dict[str, Tensor], weighted: bool) -> Tensor:
    settings, trick = embeddings.settings, embeddings.settings.quotient_remainder
    samples = []
    for sample, sample_factors in zip(BAGS, FACTORS, strict=True):
        vectors = []
        for c, (name, bag) in enumerate(zip(COLUMNS, sample, strict=True)):
            factors = [Tensor([f]).double() if weighted else torch.ones(1).double() for f in sample_factors[c]]
            if settings.pooling_weights:
                factors = [f * rows[f"{name}/pooling"][i] for f, i in zip(factors, bag, strict=True)]

            def pooled(table: str, positions: list[int], factors: list[Tensor] = factors) -> Tensor:
                total = 0 * rows[table][0]
                for factor, i in zip(factors, positions, strict=True):
                    total = total + factor * rows[table][i]
                return total / max(1, len(positions)) if settings.pooling == "mean" else total

            if trick is not None and COLUMNS[name] > trick.threshold:
                quotient = pooled(f"{name}/quotient", [i // trick.collisions for i in bag])
                remainder = pooled(f"{name}/remainder", [i % trick.collisions for i in bag])
                vector = {
                    "mult": lambda q=quotient, r=remainder: q * r,
                    "add": lambda q=quotient, r=remainder: q + r,
                    "concat": lambda q=quotient, r=remainder: torch.cat([q, r]),
                }[trick.operation]()
            else:
                vector = pooled(name, bag)
            if settings.project and len(vector) < embeddings.embedding_dim:
                vector = embeddings.projections[c].weight @ vector
            vectors.append(vector)
        samples.append(torch.cat(vectors))
    return torch.stack(samples)


SETTINGS = {
    "plain": {},
    "mean": {"pooling": "mean"},
    "widths": {"dims": {"B": 2}},
    "projected": {"dims": {"B": 2, "C": 1}, "project": True},
    "rule": {"mixed_dimensions": MixedDimensions(temperature=0.5), "project": True},
    "mult": {"quotient_remainder": QuotientRemainder(collisions=4, threshold=5)},
    "add, mean": {
        "quotient_remainder": QuotientRemainder(collisions=8, operation="add", threshold=0),
        "pooling": "mean",
    },
    "concat": {"quotient_remainder": QuotientRemainder(collisions=4, operation="concat", threshold=6)},
    "learned": {"pooling_weights": "learned"},
    "learned, all": {
        "pooling_weights": "learned",
        "pooling": "mean",
        "dims": {"A": 2},
        "project": True,
        "quotient_remainder": QuotientRemainder(collisions=4, threshold=6),
    },
}  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights with the ids"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_vectors_equal_loops_and_so_do_their_gradients(options: dict, weighted: bool) -> None:
    embeddings = Embeddings(COLUMNS, 4, 1, TableSettings(**options)).double()
    if embeddings.pooling_weights is not None:
        torch.nn.init.normal_(embeddings.pooling_weights.weight)
    rows = rows_of(embeddings)
    vectors, expected = embeddings(as_ids(weighted)), by_loops(embeddings, rows, weighted)
    assert vectors.shape[1] == sum(embeddings.widths)
    torch.testing.assert_close(vectors, expected)
    factor = torch.arange(1.0, vectors.numel() + 1).view_as(vectors).double()
    (vectors * factor).sum().backward()
    projections = [p.grad.clone() for p in embeddings.projections.parameters()]
    embeddings.projections.zero_grad()
    (expected * factor).sum().backward()
    for ours, loops in zip(projections, embeddings.projections.parameters(), strict=True):
        torch.testing.assert_close(ours, loops.grad)
    for lookup in (m for m in embeddings.modules() if isinstance(m, EmbeddingTables)):
        gradient = lookup.gradient()
        full = torch.zeros_like(lookup.weight).index_copy(0, gradient.rows, gradient.values)
        for piece in lookup.pieces:
            torch.testing.assert_close(piece.of(full), rows[piece.name].grad, msg=lambda m, p=piece: f"{p.name}: {m}")


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_one_id_a_column_is_a_bag_of_one(options: dict) -> None:
    embeddings = Embeddings(COLUMNS, 4, 1, TableSettings(**options))
    ids = one_hot()
    bags = SparseIds(values=ids.values.flatten(), tables=3, offsets=torch.arange(7))
    torch.testing.assert_close(embeddings(ids), embeddings(bags))


def test_tables_of_one_width_share_a_lookup() -> None:
    trick = QuotientRemainder(collisions=4, threshold=10)
    embeddings = Embeddings(COLUMNS, 4, 1, TableSettings(dims={"C": 2}, quotient_remainder=trick))
    assert [[t.name for t in group.lookup.tables] for group in embeddings.groups] == [
        ["A", "B/quotient", "B/remainder"],
        ["C"],
    ]
    assert [table.rows for table in embeddings.groups[0].lookup.tables] == [4, 8, 4]


def test_quotient_and_remainder_start_around_zero_as_intended_by_their_authors() -> None:
    """Published code draws from U(sqrt(1/n), 1): no row would start below 0."""
    trick = QuotientRemainder(collisions=1000, threshold=10)
    (group,) = Embeddings({"A": 1_000_000}, 8, 1, TableSettings(quotient_remainder=trick)).groups
    for piece in group.lookup.pieces:
        rows = piece.of(group.lookup.weight)
        assert rows.abs().max().item() == pytest.approx(1e-3, rel=0.01)
        assert abs(rows.mean().item()) < 5e-5


def test_fixed_pooling_weights_are_read_and_stay(tmp_path: Path) -> None:
    given = {name: torch.linspace(0.5, 2, rows) for name, rows in COLUMNS.items()}
    torch.save(given, tmp_path / "factors.pt")
    embeddings = Embeddings(COLUMNS, 4, 1, TableSettings(pooling_weights=str(tmp_path / "factors.pt"))).double()
    torch.testing.assert_close(embeddings(as_ids()), by_loops(embeddings, rows_of(embeddings), False))
    lookup = embeddings.pooling_weights
    embeddings(as_ids()).sum().backward()
    assert lookup.gradient() is None
    torch.testing.assert_close(lookup.weight[:, 0].float(), torch.cat(list(given.values())))
    torch.save({"A": torch.ones(4), "B": torch.ones(31)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"factors \(31,\) for table B, expected \(30,\)"):
        Embeddings(COLUMNS, 4, 1, TableSettings(pooling_weights=str(tmp_path / "other.pt")))
    (tmp_path / "text").write_text("no tensors")
    torch.save({"A": Embeddings}, tmp_path / "code.pt")
    for path in ("text", "nowhere", "code.pt"):
        with pytest.raises(UserError, match="expected learned, or a file"):
            Embeddings(COLUMNS, 4, 1, TableSettings(pooling_weights=str(tmp_path / path)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TableSettings(pooling="max"), "not one of sum, mean"),
        (lambda: TableSettings(dims={"A": 1}, mixed_dimensions=MixedDimensions(temperature=0.3)), "both give widths"),
        (lambda: MixedDimensions(temperature=2), "temperature is 2; expected 0 to 1"),
        (lambda: QuotientRemainder(collisions=0), "collisions is 0"),
        (lambda: QuotientRemainder(collisions=2, operation="xor"), "not one of mult, add, concat"),
        (lambda: Embeddings(COLUMNS, 4, 1, TableSettings(dims={"Z": 3})), "names Z, which is not a table"),
        (lambda: Embeddings(COLUMNS, 4, 1, TableSettings(dims={"A": 8}, project=True)), "A has the width 8, more"),
        (
            lambda: Embeddings(COLUMNS, 3, 1, TableSettings(quotient_remainder=QuotientRemainder(
                collisions=2, operation="concat", threshold=5))),
            "halves the width of table B, which is 3",
        ),
        (
            lambda: Embeddings(COLUMNS, 6, 1, TableSettings(mixed_dimensions=MixedDimensions(temperature=0))),
            "A has the width 8, more than embedding_dim, which is 6",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()

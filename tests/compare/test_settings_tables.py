"""Contract: a table of settings shows what differs between configurations, and leaves out what none of them chose."""

from lightning_dlrm.compare.settings_tables import differing_rows


def test_defaults_are_left_out_at_any_depth() -> None:
    network = "model.network.init_args"
    wide = {"model.network.class_path": "DLRM", f"{network}.embedding_dim": 8, f"{network}.dropout": 0.0}
    wide |= {f"{network}.tables.project": False, f"{network}.tables.pooling": "sum"}
    wide |= {f"{network}.tables.initial_bound": 0.01}
    rows = differing_rows({"wide": wide, "plain": {"model.network.class_path": "DCN"}})
    assert rows == [
        ["network", "DLRM", "DCN"],
        ["network.embedding_dim", "8", "-"],
        ["network.tables.initial_bound", "0.01", "-"],
    ]

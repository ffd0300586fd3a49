"""What a fit says at its start and at its end."""

from collections.abc import Mapping

from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.models.accounting import ModelSize
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import RunFolder


def demo_note() -> str:
    """Said at the start of every run on demo data."""
    return (
        "This is DEMO DATA: generated clicks of a planted model, whose best reachable score is known. For real data:\n"
        "  python -m lightning_dlrm preprocess --dataset kaggle --protocol dlrm --input train.txt --output criteo\n"
        "  python -m lightning_dlrm fit --config dlrm.yaml --config criteo_kaggle.yaml --data.path criteo"
    )


def size_note(size: ModelSize) -> str:
    """Said at the start of every run; the same numbers as ``params`` counts."""
    return (
        f"parameters: {size.total:,} ({size.tables:,} in tables, {size.dense:,} dense); FLOPs per sample: "
        f"{size.flops_per_sample_forward:,} forward, {size.flops_per_sample_training:,} in training"
    )


def final_report(
    folder: RunFolder, final: Mapping[str, float], best: Mapping[str, float], schema: DatasetSchema
) -> str:
    """The run's last words: its validation scores, its speed, and where everything is."""
    rows = [("validation", "at the end", "best")]
    for metric in ("auc", "log_loss", "normalized_entropy", "accuracy", "calibration"):
        name = f"{names.VALIDATION}/{metric}"
        if name in final:
            rows.append((metric, f"{final[name]:.6f}", f"{best[name]:.6f}" if name in best else ""))
    lines = ["", *(f"{a:24s}{b:>14s}{c:>14s}" for a, b, c in rows)]
    lines.append(
        f"{final[names.SAMPLES_PER_SECOND]:,.0f} samples/s; "
        f"{100 * final[names.DATA_WAIT_SHARE]:.1f}% of the time waiting for data"
    )
    auc = final.get(f"{names.VALIDATION}/auc")
    if schema.dataset == "demo" and auc is not None:
        lines.append(demo_result(auc, final[names.OPTIMUM_AUC]))
    lines.append(f"everything is in {folder.path}")
    return "\n".join(lines)


def demo_result(auc: float, optimum: float) -> str:
    """How far a fit on demo data came."""
    share = (auc - 0.5) / (optimum - 0.5)
    return (
        f"DEMO DATA: AUC {auc:.4f} of the best reachable {optimum:.4f}; "
        f"{100 * share:.1f}% of the way from 0.5, {optimum - auc:.4f} short"
    )

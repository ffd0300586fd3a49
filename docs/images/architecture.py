"""Draw architecture.svg: the way of one batch through the code. python docs/images/architecture.py"""

from pathlib import Path

WIDTH, HEIGHT = 990, 560
COLORS = {"data": "#d7e8f7", "model": "#fde6cf", "table": "#dcefd9", "engine": "#ece3f5", "disk": "#f4f4f4"}

# Name -> left, top, width, height, kind, title, lines below it.
BOXES = {
    "raw": (20, 30, 170, 74, "disk", "raw log", ["CSV, Parquet, Criteo", "or a generator"]),
    "folder": (270, 30, 190, 74, "disk", "dataset folder", ["dataset.json, vocabulary", "Parquet parts"]),
    "stream": (540, 30, 180, 74, "data", "stream", ["order by arithmetic,", "a thread decodes"]),
    "batch": (780, 30, 160, 74, "data", "Batch", ["label, dense,", "ids of every table"]),
    "lookup": (780, 180, 160, 92, "table", "tables: lookup", ["ids to vectors;", "device, host,", "or other ranks"]),
    "score": (
        540,
        180,
        180,
        92,
        "model",
        "network: score",
        ["dense, vectors to logits;", "what torch.compile", "compiles"],
    ),
    "loss": (270, 180, 190, 92, "engine", "loss", ["mean over the", "global batch"]),
    "module": (20, 180, 170, 92, "engine", "CTRModule", ["Lightning's loop,", "callbacks, loggers,", "precision"]),
    "dense": (540, 350, 180, 74, "model", "dense gradients", [".grad; all-reduce", "over ranks"]),
    "rows": (780, 350, 160, 74, "table", "row gradients", ["unique rows, summed;", "all-to-all over ranks"]),
    "optimizer": (270, 350, 190, 74, "engine", "CTROptimizer", ["torch.optim for dense,", "update rules for rows"]),
    "run": (20, 350, 170, 74, "disk", "run folder", ["metrics, checkpoints,", "predictions; W&B"]),
}
# From, to, label; sides are found by the positions of the boxes.
ARROWS = [
    ("raw", "folder", "preprocess"), ("folder", "stream", ""), ("stream", "batch", ""), ("batch", "lookup", "ids"),
    ("lookup", "score", "vectors"), ("score", "loss", "logits"), ("module", "loss", "training_step"),
    ("score", "dense", "backward"), ("lookup", "rows", "backward"), ("dense", "optimizer", ""),
    ("module", "run", "logs"),
]  # fmt: skip
LEGEND = [
    ("disk", "on disk"),
    ("data", "datamodules/"),
    ("table", "tables/, sharding/"),
    ("model", "models/"),
    ("engine", "engine/, optim/"),
]


def text(x: float, y: float, words: str, size: int = 13, weight: str = "normal", anchor: str = "middle") -> str:
    escaped = words.replace("&", "&amp;")
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">{escaped}</text>'


def box(left: int, top: int, width: int, height: int, kind: str, title: str, lines: list[str]) -> list[str]:
    middle = left + width / 2
    return [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="6" fill="{COLORS[kind]}" stroke="#444"/>',
        text(middle, top + 21, title, 15, "bold"),
        *(text(middle, top + 41 + 18 * i, line) for i, line in enumerate(lines)),
    ]


def arrow(points: list[tuple[float, float]], label: str, at: tuple[float, float], dashed: bool = False) -> list[str]:
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    style = ' stroke-dasharray="5 4"' if dashed else ""
    drawn = [f'<path d="{path}" fill="none" stroke="#444" stroke-width="1.5" marker-end="url(#head)"{style}/>']
    return [*drawn, text(*at, label, 12)] if label else drawn


def between(start: str, end: str, label: str) -> list[str]:
    ax, ay, aw, ah, *_ = BOXES[start]
    bx, by, bw, bh, *_ = BOXES[end]
    if ay == by:
        left_to_right = ax < bx
        points = (
            [(ax + aw, ay + ah / 2), (bx, by + bh / 2)]
            if left_to_right
            else [(ax, ay + ah / 2), (bx + bw, by + bh / 2)]
        )
        at = ((points[0][0] + points[1][0]) / 2, points[0][1] - 8)
    else:
        points = [(ax + aw / 2, ay + ah), (bx + bw / 2, by)]
        at = (points[0][0] + 34, (points[0][1] + points[1][1]) / 2 + 4)
    return arrow(points, label, at)


def picture() -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" fill="#222">'
    ]
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
    parts.append(
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    )
    parts.append('<path d="M0 0 L8 4 L0 8 z" fill="#444"/></marker></defs>')
    for one in BOXES.values():
        parts += box(*one)
    for start, end, label in ARROWS:
        parts += between(start, end, label)
    # Gradients of rows pass below the dense ones; the optimizer writes both kinds of parameters back.
    parts += arrow([(860, 424), (860, 462), (365, 462), (365, 426)], "row gradients", (700, 455))
    parts += arrow(
        [(330, 424), (330, 490), (968, 490), (968, 226), (942, 226)], "updated rows", (560, 505), dashed=True
    )
    parts += arrow([(420, 350), (420, 318), (575, 318), (575, 274)], "updated parameters", (490, 312), dashed=True)
    for place, (kind, words) in enumerate(LEGEND):
        x = 40 + 180 * place
        parts.append(f'<rect x="{x}" y="526" width="16" height="16" fill="{COLORS[kind]}" stroke="#444"/>')
        parts.append(text(x + 24, 539, words, 13, anchor="start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture())

"""From the content of metrics.json to text and pictures."""

import importlib.util
from pathlib import Path
from typing import Any

from ..stack.manifest import write_atomic


PICTURES = ("matrix.png", "overlap.png")  # drawn where matplotlib is installed (extra `report`)
_NAMES = {
    "average_accuracy": "average accuracy (AA)",
    "backward_transfer": "backward transfer (BWT)",
    "forgetting": "forgetting",
    "forward_transfer_gem": "forward transfer (GEM)",
    "learning_accuracy": "learning accuracy",
}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _rows(result: dict[str, Any]) -> list[list[str]]:
    names = [info["name"] for info in result["trained"]]
    rows = [["trained on", *result["tasks"], "density"]]
    densities = [info["density"] for info in result["trained"]]
    for number, scores in enumerate(result["matrix"]):
        label = "nothing yet" if number == 0 else f"{number}. {names[number - 1]}"
        kept = "" if number == 0 else f"{100 * densities[number - 1]:.1f} %"
        rows.append([label, *map(_percent, scores), kept])
    return rows


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    lines = ["  ".join(row) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table(result: dict[str, Any], method: str) -> str:
    """The accuracy matrix in percent (rows: after which task, columns: on which) and the derived metrics."""
    lines = [f"\n{method}: accuracy in % after each task", _align(_rows(result)), ""]
    for key, name in _NAMES.items():
        if key in result:
            lines.append(f"{name:<24} {100 * result[key]:6.1f}   {result['formulas'][key]}")
    return "\n".join(lines)


def comparison(results: dict[str, dict[str, Any]]) -> str:
    """Several methods on the same tasks, side by side: {method: content of its metrics.json}."""
    keys = ["average_accuracy", "backward_transfer", "forgetting", "learning_accuracy"]
    rows = [["method", "AA", "BWT", "forgetting", "learning acc.", "density", "seconds"]]
    for method, result in results.items():
        trained = result["trained"]
        density = sum(info["density"] for info in trained) / len(trained)
        seconds = f"{sum(info['seconds'] for info in trained):.0f}"
        rows.append([method, *(_percent(result.get(key)) for key in keys), f"{100 * density:.1f} %", seconds])
    return f"\nall methods, in % (AA: average accuracy after the last task; BWT: backward transfer)\n{_align(rows)}"


def _markdown(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def pairs(result: dict[str, Any]) -> list[list[str]]:
    """Rows (task, earlier task, collision rate, overlap) of every pair of finished tasks with a gate."""
    names = [info["name"] for info in result["trained"]]
    rows = [["task", "earlier task", "collision |Si & Sj| / entries", "overlap |Si & Sj| / min(|Si|, |Sj|)"]]
    for info in result["trained"]:
        for other, collision, overlap in zip(names, info.get("collision", ()), info.get("overlap", ()), strict=False):
            rows.append([info["name"], other, f"{collision:.4%}", f"{overlap:.2%}"])
    return rows


def write_report(folder: Path, result: dict[str, Any], draw: bool | None = None) -> None:
    """Write report.md and, unless `draw` is False or matplotlib is not installed, the PICTURES beside it."""
    parts = [
        f"# {result['method']}",
        "Accuracy in %. Row: after training on that task. Column: evaluated on.",
        _markdown(_rows(result)),
    ]
    metrics = [["metric", "value", "definition"]]
    metrics += [[n, f"{100 * result[k]:.2f}", f"`{result['formulas'][k]}`"] for k, n in _NAMES.items() if k in result]
    if len(metrics) > 1:
        parts.append(_markdown(metrics))
    if len(pairs(result)) > 1:
        parts += ["## Supports", _markdown(pairs(result))]
    if result["trained"]:
        cost = [["task", "steps", "examples", "effective batch", "texts cut", "density", "seconds"]]
        for info in result["trained"]:
            values = [
                info["steps"],
                info["train_examples"],
                info["effective_batch"],
                "-" if info["truncated"] is None else info["truncated"],
                f"{info['density']:.2%}",
            ]
            cost.append([info["name"], *map(str, values), f"{info['seconds']:.0f}"])
        parts += ["## Training", _markdown(cost)]
    if draw is not False and importlib.util.find_spec("matplotlib") and len(result["matrix"]) > 1:
        draw_matrix(result, folder / "matrix.png")
        if len(pairs(result)) > 1:
            draw_overlap(result, folder / "overlap.png")
    if (folder / "overlap.png").is_file() and len(pairs(result)) > 1:
        parts.insert(parts.index("## Supports") + 2, "![overlap of the supports](overlap.png)")
    if (folder / "matrix.png").is_file():
        parts.insert(3, "![accuracy matrix](matrix.png)")
    write_atomic(folder / "report.md", "\n\n".join(parts) + "\n")


def draw_matrix(result: dict[str, Any], path: Path) -> None:
    """The accuracy matrix as a heat map with numbers."""
    rows = [[float("nan") if v is None else 100 * v for v in row] for row in result["matrix"]]
    labels = ["zero-shot", *(info["name"] for info in result["trained"])]
    _heat_map(path, rows, labels, result["tasks"], result["method"], "accuracy in % on", "after training on")


def draw_overlap(result: dict[str, Any], path: Path) -> None:
    """The overlap of every pair of supports, in % of the smaller one, as a heat map with numbers."""
    names = [info["name"] for info in result["trained"]]
    rows = [[float("nan")] * len(names) for _ in names]
    for i, info in enumerate(result["trained"]):
        rows[i][i] = 100.0
        for j, overlap in enumerate(info.get("overlap", ())):
            rows[i][j] = rows[j][i] = 100 * overlap
    _heat_map(path, rows, names, names, "overlap |Si & Sj| / min(|Si|, |Sj|) in %", "task", "task")


def _heat_map(path: Path, rows: list[list[float]], down: list[str], across: list[str], title: str, x: str, y: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.1 * len(rows[0]), 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(rows, vmin=0, vmax=100, cmap="YlGn", aspect="auto")
    axes.set_xticks(range(len(across)), across)
    axes.set_yticks(range(len(down)), down)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value == value:
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 65 else "black")
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)

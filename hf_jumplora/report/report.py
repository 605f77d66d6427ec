"""Text and pictures from the content of metrics.json."""

import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..disk import write_atomic
from ..escape import cell, code, plot
from ..metrics.units import PERCENT, Unit, common, unit_of, units_of


PICTURES = ("matrix.png", "overlap.png")  # drawn where matplotlib is installed (extra `report`)
METRIC_NAMES = {
    "average_accuracy": "average accuracy (AA)",
    "backward_transfer": "backward transfer (BWT)",
    "forgetting": "forgetting",
    "forward_transfer_gem": "forward transfer (GEM)",
    "learning_accuracy": "learning accuracy",
}


def figures(result: dict[str, Any], digits: int = 1) -> dict[str, tuple[str, str]]:
    """{metric of metrics.json: (its name, its value)} of the metrics that were measured."""
    unit = common(units_of(result)) or PERCENT
    named = METRIC_NAMES if unit.share else {k: n.replace("accuracy", unit.name) for k, n in METRIC_NAMES.items()}
    return {key: (name, unit.show(result[key], digits)) for key, name in named.items() if key in result}


def matrix_rows(result: dict[str, Any]) -> list[list[str]]:
    """The accuracy matrix, each score in its unit, with the density of each task."""
    names = [info["name"] for info in result["trained"]]
    rows = [["trained on", *result["tasks"], "density"]]
    found = units_of(result)
    densities = [info["density"] for info in result["trained"]]
    for number, scores in enumerate(result["matrix"]):
        label = "before training" if number == 0 else f"{number}. {names[number - 1]}"
        if number and (reused := result["trained"][number - 1].get("reused")):
            label += f" (not trained: {reused} serves it)"
        kept = "" if number == 0 else f"{100 * densities[number - 1]:.1f} %"
        rows.append([label, *(unit.show(value) for unit, value in zip(found, scores, strict=True)), kept])
    return rows


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    lines = ["  ".join(row) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table(result: dict[str, Any], method: str) -> str:
    """The accuracy matrix (rows: after which task, columns: on which), the derived metrics and, where it was measured,
    general ability."""
    lines = [f"\n{method}: {measured_as(result)} after each task", _align(matrix_rows(result)), ""]
    for key, (name, value) in figures(result).items():
        lines.append(f"{name:<24} {value:>6}   {result['formulas'][key]}")
    if len(general := general_rows(result)) > 1:
        lines += ["", "general ability", _align(general)]
    return "\n".join(lines)


def measured_as(result: dict[str, Any]) -> str:
    """What the matrix shows: "accuracy in %", or each task's own measure and unit."""
    measures = {info["name"]: info["metric"] for info in result.get("data", ()) if not info["held_out"]}
    found = dict(zip(result["tasks"], units_of(result), strict=True))
    if all(unit.share for unit in found.values()):
        if set(measures.values()) <= {"accuracy", None}:
            return "accuracy in %"
        return f"score in % ({', '.join(f'{name}: {metric}' for name, metric in measures.items())})"
    kinds = {name: " in %" if unit.share else ", less is better" * (unit.sign < 0) for name, unit in found.items()}
    says = f"score ({'; '.join(f'{name}: {measures.get(name)}{kind}' for name, kind in kinds.items())})"
    return says if common(found.values()) else f"{says}; no averages, because the units differ"


def general_rows(result: dict[str, Any]) -> list[list[str]]:
    """Scores on tasks that were not trained on, and cross-entropy of plain text: before training, after each task, and
    the change. Only the header if nothing was measured."""
    rows, names = result.get("general", []), [info["name"] for info in result["trained"]]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    found = {key: general_unit(key, rows) for key in keys}
    shown = [["trained on", *(general_name(key, found[key]) for key in keys)]]
    for number, row in enumerate(rows if keys else ()):
        label = f"{number}. {names[number - 1]}" if number else "before training"
        shown.append([label, *(found[key].show(row.get(key)) for key in keys)])
    if len(shown) > 2:
        first, last = rows[0], rows[-1]
        both = {key: last[key] - first[key] for key in keys if key in first and key in last}
        shown.append(["change", *(found[key].show(both.get(key), plus="+") for key in keys)])
    return shown


def general_unit(key: str, rows: Iterable[Mapping[str, float]]) -> Unit:
    """The unit of a column of general ability ("wikitext cross_entropy")."""
    return unit_of(key.split(" ")[1], (row.get(key) for row in rows))


def general_name(key: str, unit: Unit = PERCENT) -> str:
    """The header of a column of general ability, "wikitext cross-entropy" of "wikitext cross_entropy"."""
    task, measure = key.split(" ")
    return f"{task} cross-entropy" if in_nats(key) else f"{task} {measure.replace('_', ' ')}{' %' * unit.share}"


def in_nats(key: str) -> bool:
    """Whether a column of general ability is a cross-entropy (in nats per token), else a score in [0, 1]."""
    return key.endswith(" cross_entropy")


def data_rows(result: dict[str, Any]) -> list[list[str]]:
    """For each task: the source and number of its rows, its metric and its prompt."""
    rows = [["task", "data", "training rows", "evaluated rows", "measured", "prompt style", "trained on"]]
    for info in result.get("data", ()):
        sizes = ["-" if n is None else str(n) for n in (info["train_examples"], info["eval_examples"])]
        cells = [info["name"], info["source"] or "-", *sizes, info["metric"] or "-", info["prompt_style"]]
        rows.append([*cells, "no, held out" if info["held_out"] else "yes"])
    return rows


def warning(result: dict[str, Any]) -> str | None:
    """The warning if prompts name their data set, else None."""
    names = sorted({name for info in result.get("data", ()) for name in info["names_in_prompt"]})
    if not names:
        return None
    return (
        f"**Warning: the prompt names the data set** ({', '.join(names)}): the model is told which task it is. Such "
        "numbers cannot be compared with those of prompts that do not."
    )


GENERAL = (
    "Accuracies in %, cross-entropy in nats per token, on held-out tasks and on plain text. The row `change` is the "
    "last row minus the first."
)
NOT_MEASURED = (
    "not measured: give `general_text` (text that belongs to no task, for its cross-entropy), or tasks with "
    "`held_out=True` (for their accuracy)"
)


def comparison(results: dict[str, dict[str, Any]]) -> str:
    """Several methods on the same tasks, side by side: {method: content of its metrics.json}."""
    keys = ["average_accuracy", "backward_transfer", "forgetting", "learning_accuracy"]
    general = list(dict.fromkeys(key for result in results.values() for key in (result.get("general") or [{}])[0]))
    rows = [["method", "AA", "BWT", "forgetting", "learning acc.", "density", "seconds"]]
    found = {key: general_unit(key, [row for r in results.values() for row in r.get("general", ())]) for key in general}
    rows[0] += [f"{general_name(key, found[key])}, change" for key in general]
    for method, result in results.items():
        trained = result["trained"]
        density = sum(info["density"] for info in trained) / len(trained)
        seconds = f"{sum(info['seconds'] for info in trained):.0f}"
        known = figures(result)
        rows.append([method, *(known.get(key, ("", "-"))[1] for key in keys), f"{100 * density:.1f} %", seconds])
        first, *_, last = result.get("general") or [{}, {}]
        both = {key: last[key] - first[key] for key in general if key in first and key in last}
        rows[-1] += [found[key].show(both.get(key), plus="+") for key in general]
    measured = measured_as(next(iter(results.values())))
    about = f"{measured} (AA: average after the last task; BWT: backward transfer)"
    return f"\nall methods, {about}\n{_align(rows)}"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its header."""
    head, *body = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def pairs(result: dict[str, Any]) -> list[list[str]]:
    """Rows (task, earlier task, collision rate, overlap) of every pair of finished tasks with a gate."""
    names = [info["name"] for info in result["trained"]]
    rows = [["task", "earlier task", "collision Si & Sj / entries", "overlap Si & Sj / smaller of Si, Sj"]]
    for info in result["trained"]:
        for other, collision, overlap in zip(names, info.get("collision", ()), info.get("overlap", ()), strict=False):
            rows.append([info["name"], other, f"{collision:.4%}", f"{overlap:.2%}"])
    return rows


def write_report(folder: Path, result: dict[str, Any], draw: bool = True) -> None:
    """Write report.md and, unless `draw` is False or matplotlib is not installed, the PICTURES next to it."""
    measured = measured_as(result)
    parts = [
        f"# {result['method']}",
        f"{measured[0].upper()}{measured[1:]}. Row: after training on that task. Column: evaluated on.",
        markdown(matrix_rows(result)),
    ]
    metrics = [["metric", "value", "definition"]]
    metrics += [[name, value, f"`{result['formulas'][key]}`"] for key, (name, value) in figures(result, 2).items()]
    if len(metrics) > 1:
        parts.append(markdown(metrics))
    general = general_rows(result)
    parts += [
        "## General ability",
        *([GENERAL, markdown(general)] if len(general) > 1 else [f"General ability was {NOT_MEASURED}."]),
    ]
    if len(pairs(result)) > 1:
        parts += ["## Supports", markdown(pairs(result))]
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
        parts += ["## Training", markdown(cost)]
    if len(data := data_rows(result)) > 1:
        parts += ["## Data", markdown(data)]
        prompts = dict.fromkeys(info["prompt"] for info in result["data"] if info["prompt"])
        parts += [f"Prompt: {code(json.dumps(prompt, ensure_ascii=False))}" for prompt in prompts]
    if draw and importlib.util.find_spec("matplotlib") and len(result["matrix"]) > 1:
        draw_matrix(result, folder / "matrix.png")
        if len(pairs(result)) > 1:
            draw_overlap(result, folder / "overlap.png")
    if (folder / "overlap.png").is_file() and len(pairs(result)) > 1:
        parts.insert(parts.index("## Supports") + 2, "![overlap of the supports](overlap.png)")
    if (folder / "matrix.png").is_file():
        parts.insert(3, "![accuracy matrix](matrix.png)")
    if text := warning(result):
        parts.insert(1, text)
    write_atomic(folder / "report.md", "\n\n".join(parts) + "\n")


def draw_matrix(result: dict[str, Any], path: Path) -> None:
    """The accuracy matrix as a heat map with numbers."""
    found = units_of(result)
    rows = [
        [100 * v if v is not None and unit.share else float("nan") for unit, v in zip(found, row, strict=True)]
        for row in result["matrix"]
    ]
    texts = [[unit.show(v, 0) for unit, v in zip(found, row, strict=True)] for row in result["matrix"]]
    labels = ["before training", *(info["name"] for info in result["trained"])]
    measured = measured_as(result).split(" (")[0]
    _heat_map(path, rows, labels, result["tasks"], result["method"], f"{measured} on", "after training on", texts)


def draw_overlap(result: dict[str, Any], path: Path) -> None:
    """The overlap of every pair of supports, in % of the smaller one, as a heat map with numbers."""
    names = [info["name"] for info in result["trained"]]
    rows = [[float("nan")] * len(names) for _ in names]
    for i, info in enumerate(result["trained"]):
        rows[i][i] = 100.0
        for j, overlap in enumerate(info.get("overlap", ())):
            rows[i][j] = rows[j][i] = 100 * overlap
    texts = [[f"{value:.0f}" if value == value else "" for value in row] for row in rows]
    _heat_map(path, rows, names, names, "overlap |Si & Sj| / min(|Si|, |Sj|) in %", "task", "task", texts)


def _heat_map(
    path: Path, rows: list[list[float]], down: list[str], across: list[str], title: str, x: str, y: str,
    texts: list[list[str]],
) -> None:  # fmt: skip
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.1 * len(rows[0]), 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(rows, vmin=0, vmax=100, cmap="YlGn", aspect="auto")
    axes.set_xticks(range(len(across)), list(map(plot, across)))
    axes.set_yticks(range(len(down)), list(map(plot, down)))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(plot(title))
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            axes.text(j, i, texts[i][j], ha="center", va="center", color="white" if value > 65 else "black")
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)

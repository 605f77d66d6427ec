"""From the cells of a bench to table.md, results.json and accuracy.png."""

import importlib.util
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..disk import write_atomic, write_json
from ..metrics import FORMULAS
from ..report.report import general_name, in_nats, markdown, warning


_SCORES = {
    "average_accuracy": "AA",
    "backward_transfer": "BWT",
    "forgetting": "forgetting",
    "learning_accuracy": "learning acc.",
}
REFERENCE = "inclora"


def read_cells(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{method: its final cells in the order of their seeds}."""
    cells: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((folder / "cells").glob("final-*.json")):
        cell = json.loads(path.read_text())
        cells[cell["spec"]["method"]].append(cell)
    return {method: sorted(runs, key=lambda cell: cell["spec"]["seed"]) for method, runs in cells.items()}


def spread(values: list[float | None], scale: float = 1.0, digits: int = 1) -> str:
    """`mean ± standard deviation` over seeds, the mean alone for one seed, `-` where a value is missing."""
    numbers = [scale * value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return "-"
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def summary(cell: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of one run: metrics in [0, 1], seconds, bytes.

    density: mean over tasks; collision: mean over pairs of tasks (None without a gate). `state_bytes`: tensors the
    strategies hold when the last task starts; `growth`: how many more than when the second one started.
    """
    metrics = cell["metrics"]
    trained, held = metrics["trained"], cell["state_bytes"]
    collisions = [value for info in trained for value in info.get("collision", ())]
    return {
        **{key: metrics.get(key) for key in _SCORES},
        "density": statistics.mean(info["density"] for info in trained),
        "collision": statistics.mean(collisions) if collisions else None,
        "seconds": sum(info["seconds"] for info in trained),
        "step_seconds": cell["step_seconds"],
        "peak_rss": cell["peak_rss"],
        "state_bytes": held[-1],
        "growth": held[-1] - held[1] if len(held) > 2 else 0,
    }


def _row(method: str, runs: list[dict[str, Any]], reference: dict[str, float]) -> list[str]:
    good = [run for run in runs if not run["error"]]
    errors = sorted({run["error"] for run in runs if run["error"]})
    note = "; ".join(error.replace("\n", " ").replace("|", "/")[:160] for error in errors)
    if not good:
        return [method, *["-"] * 12, f"failed: {note}"]
    values = [summary(run) for run in good]
    column = {key: [value[key] for value in values] for key in values[0]}

    def relative(key: str) -> str:
        mine = statistics.mean(v for v in column[key] if v is not None)
        return f"{mine / reference[key]:.2f}" if key in reference else "-"

    state, growth = column["state_bytes"][0] or 0, column["growth"][0] or 0
    spec = good[0]["spec"]
    return [
        method,
        *(spread(column[key], 100) for key in _SCORES),
        spread(column["density"], 100),
        spread(column["collision"], 100, 2),
        f"{spec['rate']:g}" + ("" if spec["weight"] is None else f", {spec['weight']:g}"),
        spread(column["seconds"], digits=0),
        relative("step_seconds"),
        spread(column["peak_rss"], 1 / 2**20, 0),
        f"{state / 2**20:.1f}",
        "yes" if growth > 0 else "no",
        f"{len(good)} seeds" + (f"; {len(runs) - len(good)} failed: {note}" if errors else ""),
    ]


_HEAD = [
    "method", *_SCORES.values(), "density %", "collision %", "rate, weight", "seconds", f"step / {REFERENCE}",
    "peak MiB", "own state MiB", "grows", "runs",
]  # fmt: skip


def write_table(folder: Path) -> str:
    """Write table.md, results.json and, with matplotlib, accuracy.png from the finished cells; returns table.md."""
    settings, cells = json.loads((folder / "bench.json").read_text()), read_cells(folder)
    good = [summary(run) for run in cells.get(REFERENCE, ()) if not run["error"]]
    reference = {"step_seconds": statistics.mean(v["step_seconds"] or 0 for v in good)} if good else {}
    rows = [_row(method, runs, reference) for method, runs in cells.items()]
    rows.sort(key=lambda row: -float(row[1].split()[0]) if row[1] != "-" else 1.0)
    budget, tasks = settings["budget"], settings["tasks"]
    style = "none (the text alone)" if settings["setting"] == "encoder" else settings["prompt_style"] or "the stream's"
    length, of = (
        settings.get("max_length", budget["max_length"]),
        " with the prompt" if "max_length" in settings else "",
    )
    parts = [
        f"# Methods on {settings['stream']}",
        f"Setting {settings['setting']}, model {settings['model']}, prompt style: {style}; "
        f"{budget['steps']} steps per task, effective batch {budget['batch']}, at most {length} tokens{of}. "
        "Mean ± standard deviation over seeds.",
        markdown([["task", "training examples", "test examples", "measured"]]
                  + [[t["name"], str(t["train_examples"]), str(t["test_examples"]), t.get("metric", "accuracy")]
                     for t in tasks]),
    ]  # fmt: skip
    if text := warning({"data": tasks}):
        parts.append(text)
    parts.append(markdown([_HEAD, *rows]))
    parts.append(
        "\n".join(f"- {name}: `{FORMULAS[key]}`" for key, name in _SCORES.items())
        + "\n- density: entries of the update that are kept, mean over tasks; collision: mean over pairs of tasks "
        "of shared entries / all entries\n- step: time of a training step (of the process, on a CPU) relative to that "
        f"of {REFERENCE}; seconds: training and evaluation of all tasks, with other runs beside it\n- own state: "
        "tensors the method holds when the last task starts, beside the adapters; grows: more than when the second "
        "task started"
    )
    general = _general_rows(cells)
    parts.append("## General ability")
    if len(general) > 1:
        parts.append(
            "Before training → after the last task, mean ± standard deviation over seeds: accuracies in % on what no "
            "method was trained on, cross-entropy of plain text in nats per token."
        )
        parts.append(markdown(general))
    else:
        parts.append("Not measured: give `--held_out` tasks or, in the setting causal, `--general_text`.")
    if cells:
        write_json(folder / "results.json", {m: [c.get("metrics") for c in runs] for m, runs in cells.items()})
    if any(not run["error"] for runs in cells.values() for run in runs):
        if importlib.util.find_spec("matplotlib"):
            draw(cells, [t["name"] for t in tasks], folder / "accuracy.png")
            parts.append("![accuracy over tasks](accuracy.png)")
        parts.append("## Accuracy after each task, mean over seeds")
        for method, runs in cells.items():
            if matrix := mean_matrix([run["metrics"]["matrix"] for run in runs if not run["error"]]):
                parts.append(f"### {method}\n\n{markdown(_matrix_rows(matrix, settings))}")
    text = "\n\n".join(parts) + "\n"
    write_atomic(folder / "table.md", text)
    return text


def _general_rows(cells: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """A row per method, a column for each thing that was measured before and after; the head alone without any."""
    good = {m: [run["metrics"].get("general") for run in runs if not run["error"]] for m, runs in cells.items()}
    measured = {method: runs for method, runs in good.items() if runs and all(rows and rows[0] for rows in runs)}
    keys = list(dict.fromkeys(key for runs in measured.values() for key in runs[0][0]))

    def change(runs: list[list[dict[str, float]]], key: str) -> str:
        scale, digits = (1.0, 4) if in_nats(key) else (100.0, 1)
        return " → ".join(spread([rows[end].get(key) for rows in runs], scale, digits) for end in (0, -1))

    head = ["method", *map(general_name, keys)]
    return [head, *([method, *(change(runs, key) for key in keys)] for method, runs in measured.items())]


def mean_matrix(matrices: list[list[list[float | None]]]) -> list[list[float | None]]:
    """Entry by entry over seeds; None where it was not evaluated."""
    return [
        [None if any(v is None for v in values) else statistics.mean(values) for values in zip(*rows, strict=True)]
        for rows in zip(*matrices, strict=True)
    ]


def _matrix_rows(matrix: list[list[float | None]], settings: dict[str, Any]) -> list[list[str]]:
    names = [task["name"] for task in settings["tasks"]]
    labels = names if len(matrix) == len(names) + 1 else ["all tasks"]
    rows = [["trained on", *names]]
    for label, row in zip(["before training", *labels], matrix, strict=True):
        if any(value is not None for value in row):
            rows.append([label, *("-" if value is None else f"{100 * value:.1f}" for value in row)])
    return rows


def draw(cells: dict[str, list[dict[str, Any]]], tasks: list[str], path: Path) -> None:
    """Average accuracy over the tasks seen so far, after each task; joint training as a dashed line at its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (method, runs) in enumerate(cells.items()):
        curves = [run["learning_curve"] for run in runs if not run["error"]]
        if not curves:
            continue
        mean = [100 * statistics.mean(values) for values in zip(*curves, strict=True)]
        color = f"C{number % 10}"
        if len(mean) == 1 < len(tasks):
            axes.axhline(mean[0], linestyle="--", color=color, label=method)
        else:
            axes.plot(range(len(mean)), mean, color=color, marker="osv^D"[number // 10 % 5], label=method)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_xlabel("after training on")
    axes.set_ylabel("average accuracy in % on the tasks so far")
    axes.legend(ncols=2, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)

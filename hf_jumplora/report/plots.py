"""The pictures of report.html, as SVG text. Task names are data: nothing in them is parsed as mathematics."""

import io
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..metrics.units import common, units_of
from .folder import StoredRun


SHORT = 22  # letters of a name in a picture
PANELS = {"loss": "loss", "penalty": "penalty", "density": "density", "threshold": "threshold (tau)"}


def accuracy_over_time(metrics: dict[str, Any]) -> str:
    """The score of each task from the moment it was learned."""
    figure, axes = _figure(8, 4.2)
    stages, unit = len(metrics["matrix"]) - 1, common(units_of(metrics))
    scale = 100 if unit and unit.share else 1
    for j, task in enumerate(metrics["tasks"]):
        points = [(i, metrics["matrix"][i][j]) for i in range(j + 1, stages + 1)]
        points = [(i, scale * value) for i, value in points if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", ms=3.5, lw=1.6, color=_color(j), label=_short(task))
    axes.set_xlabel("tasks trained")
    axes.set_ylabel("score in %" if scale == 100 else unit.name if unit else "score")
    axes.set_xticks(range(1, stages + 1))
    _legend(axes)
    return _svg(figure)


def average_over_time(runs: list[StoredRun]) -> str:
    """For several runs, the mean score over the tasks trained so far."""
    figure, axes = _figure(8, 3.6)
    unit = common(unit for run in runs for unit in units_of(run.metrics))
    scale = 100 if unit and unit.share else 1
    for number, run in enumerate(runs):
        matrix, points = run.metrics["matrix"], []
        for i in range(1, len(matrix)):
            seen = [value for value in matrix[i][:i] if value is not None]
            if len(seen) == i or (seen and len(matrix) == 2):
                points.append((i, scale * sum(seen) / len(seen)))
        if points:
            axes.plot(
                *zip(*points, strict=True), marker="o", ms=3.5, lw=1.8, color=_color(number), label=_short(run.name)
            )
    axes.set_xlabel("tasks trained")
    axes.set_ylabel("mean score so far, in %" if scale == 100 else f"mean {unit.name if unit else 'score'} so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return _svg(figure)


def over_steps(history: list[dict[str, Any]]) -> str | None:
    """Loss, penalty, density and threshold over the steps of all tasks; None if nothing was logged."""
    shown = [key for key in PANELS if any(key in line for line in history)]
    if not shown:
        return None
    offset, last = 0, None
    starts: list[tuple[int, str]] = []
    where: list[int] = []
    for line in history:
        if line["task"] != last:
            offset = where[-1] if where else 0
            starts.append((offset, line["task"]))
            last = line["task"]
        where.append(offset + line["step"])
    figure = Figure(figsize=(8, 1.75 * len(shown) + 0.6), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, key in zip(panels, shown, strict=True):
        _style(axes)
        for number, (_, task) in enumerate(starts):
            points = [
                (x, line[key]) for x, line in zip(where, history, strict=True) if line["task"] == task and key in line
            ]
            if points:
                axes.plot(*zip(*points, strict=True), lw=1.4, color=_color(number))
        for start, _ in starts[1:]:
            axes.axvline(start, color="#d0d7de", lw=0.8, zorder=0)
        axes.set_ylabel(PANELS[key])
    if len(starts) <= 6:
        for start, task in starts:
            panels[0].annotate(
                _short(task), (start, 1), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points",
                fontsize=8, color="#57606a", parse_math=False,
            )  # fmt: skip
    panels[-1].set_xlabel("steps, of all tasks")
    return _svg(figure)


def layers(trained: list[dict[str, Any]]) -> str | None:
    """Left, the density of each task in each layer (where it lives); right, its mean collision with earlier tasks."""
    trained = [info for info in trained if info.get("layers")]
    if not trained:
        return None
    names = list(trained[0]["layers"])
    density = [[100 * info["layers"][name]["density"] for info in trained] for name in names]
    collision = [[_mean(info["layers"][name]["collision"]) for info in trained] for name in names]
    figure = Figure(figsize=(8, min(16, 1.8 + 0.19 * len(names))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, title in ((left, density, "entries kept, in %"), (right, collision, "shared with earlier, in %")):
        image = axes.imshow(values, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(trained)), [str(k + 1) for k in range(len(trained))], fontsize=8)
        axes.set_xlabel("task")
        figure.colorbar(image, ax=axes, fraction=0.06)
    step = -(-len(names) // 60)
    left.set_yticks(
        range(0, len(names), step),
        [_layer(name) for name in names[::step]],
        fontsize=7,
        parse_math=False,
    )
    return _svg(figure)


def _mean(values: list[float]) -> float:
    return 100 * sum(values) / len(values) if values else float("nan")


def _layer(name: str) -> str:
    """`12.self_attn.q_proj` of `model.layers.12.self_attn.q_proj`."""
    parts = name.split(".")
    first = next((k for k, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:])[-28:]


def _short(name: str) -> str:
    return name if len(name) <= SHORT else name[: SHORT - 1] + "…"


def _color(number: int) -> Any:
    return colormaps["tab20"]((number * 2 % 20 + number * 2 // 20) % 20)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def _style(axes: Axes) -> None:
    axes.grid(axis="y", color="#eaeef2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    if axes.lines:
        legend = axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        for text in legend.get_texts():
            text.set_parse_math(False)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()

"""report.html: one page about one or several runs, with its pictures inside, no script and no network access."""

import base64
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..disk import write_atomic
from ..escape import terminal
from ..metrics.units import units_of
from .folder import StoredRun
from .report import METRIC_NAMES, figures, general_rows, measured_as
from .verdict import judge, says


EXAMPLES, LETTERS = 3, 400  # a task's rows that turned from right to wrong, and how much of a text is shown


def write_page(path: Path, runs: list[StoredRun]) -> None:
    """Write one page about these runs. Without matplotlib (extra `report`) it has only the tables, and says so."""
    drawn = importlib.util.find_spec("matplotlib") is not None
    average = None
    if drawn and len(runs) > 1:
        from .plots import average_over_time

        average = average_over_time(runs)
    page = _template().render(
        runs=[_sections(run, drawn) for run in runs], drawn=drawn, average=average, figures=METRIC_NAMES
    )
    write_atomic(path, page)


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f}"
    environment.filters["shade"], environment.globals["says"] = _shade, says
    environment.filters["picture"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    return environment.get_template("page.html.j2")


def _sections(stored: StoredRun, drawn: bool) -> dict[str, Any]:
    """The template's values for one run."""
    metrics, names = stored.metrics, [info["name"] for info in stored.metrics["trained"]]
    content = {
        "name": stored.name,
        "metrics": metrics,
        "figures": figures(metrics),
        "measured": measured_as(metrics),
        "units": units_of(metrics),
        "rows": list(zip(["before training", *names], metrics["matrix"], strict=True)),
        "verdict": judge(stored),
        "general": general_rows(metrics) if len(metrics["matrix"]) > 1 else [],
        "harness": _harness(stored.harness, names),
        "overlap": [[names[i], info["overlap"]] for i, info in enumerate(metrics["trained"]) if info.get("overlap")],
        "collision": [
            [names[i], info["collision"]] for i, info in enumerate(metrics["trained"]) if info.get("collision")
        ],
        "names": names,
        "flipped": _flipped(stored),
        "answered": bool(stored.answers(len(metrics["matrix"]) - 1)),
        "settings": sorted(_flat(stored.settings).items()),
        "versions": sorted(stored.versions.items()),
        "accuracy": None,
        "steps": None,
        "layers": None,
    }
    if drawn and len(metrics["matrix"]) > 1:
        from .plots import accuracy_over_time, layers, over_steps

        content["accuracy"] = accuracy_over_time(metrics)
        content["steps"], content["layers"] = over_steps(stored.history), layers(metrics["trained"])
    return content


def _harness(found: dict[str, Any], names: list[str]) -> list[list[str]]:
    """The scores of lm-eval before training, after each task if they were measured, and with the stack; only the header
    if there are none."""
    scores = found.get("scores", {})
    each = all("each" in row for row in scores.values())
    stages = (
        [f"after {name}" for name in names[: found.get("after")]] if each else [f"after {found.get('after')} tasks"]
    )
    rows = [["lm-eval", "base model", *stages, "change"]]
    for key, row in scores.items():
        values = [row["base"], *(row["each"] if each else [row["stack"]])]
        rows.append([key, *(f"{value:.4f}" for value in values), f"{row['stack'] - row['base']:+.4f}"])
    return rows


def _flipped(stored: StoredRun) -> list[dict[str, Any]]:
    """For each task, some rows that were right when it was learned and are wrong now."""
    matrix, rows, found = stored.metrics["matrix"], stored.rows(), []
    for stage, task in enumerate(stored.metrics["tasks"][: len(matrix) - 1], 1):
        lost, won = stored.flips(task, stage)
        examples = []
        for row in lost[:EXAMPLES]:
            known = rows.get((task, row), {})
            before, now = stored.answers(stage)[task, row], stored.answers(len(matrix) - 1)[task, row]
            words = [known.get("text"), known.get("expected"), before["predicted"], now["predicted"]]
            examples.append(["–" if word is None else terminal(word)[:LETTERS] for word in words])
        if lost:
            found.append({"task": task, "lost": len(lost), "won": len(won), "examples": examples})
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a.b": text} of nested settings; texts of rows and prompts are truncated."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flat[f"{prefix}{key}"] = text if len(text) <= 200 else text[:199] + "…"
    return flat


def _shade(value: float | None, top: float = 1.0) -> str:
    """A cell's colours for a value in [0, top]: white over green to dark green, or none if it was not measured."""
    if value is None:
        return ""
    share = max(0.0, min(1.0, value / top))
    light = 97 - 62 * share
    return f"background:hsl(152 {30 + 25 * share:.0f}% {light:.0f}%);color:{'#fff' if share > 0.85 else '#1f2328'}"

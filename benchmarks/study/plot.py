"""Draws docs/study.png from the finished runs: what each method learns and forgets, and the ablations.

python benchmarks/study/plot.py [--folder benchmarks/study] [--output docs/study.png]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import yaml


matplotlib.use("agg")
from matplotlib import pyplot


OURS = "jumplora-best"


def mean(runs: list[dict[str, Any]], key: str) -> float:
    """Of the seeds, in %."""
    return 100 * statistics.mean(run[key] for run in runs)


def scatter(axes: Any, results: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Backward transfer against learning accuracy; above and to the right is better, lines join equal averages."""
    points = sorted((mean(r, "backward_transfer"), mean(r, "learning_accuracy"), name) for name, r in results.items())
    count = len(next(iter(results.values()))[0]["tasks"])
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    for level in range(35, 75, 5):  # AA = learning + BWT (T - 1) / T
        ends = [min(xs) - 1, 1]
        axes.plot(ends, [level - x * (count - 1) / count for x in ends], color="0.88", lw=0.8, zorder=0)
    step, labels = (max(ys) - min(ys) + 4) / 40, []  # a line of text
    for x, y, name in sorted(points, key=lambda p: p[1]):
        color = "C3" if name == OURS else "0.2"
        axes.plot(x, y, "o", color="C3" if name == OURS else "C0", ms=7 if name == OURS else 4)
        at = y
        while any(abs(at - other) < step and abs(x - left) < 5 for left, other in labels):
            at += step / 4
        labels.append((x, at))
        axes.annotate(
            name, (x, y), (x + 0.6, at), fontsize=7, color=color, va="center", arrowprops={"arrowstyle": "-", "lw": 0.3}
        )
    axes.set(xlim=(min(xs) - 1, 5), ylim=(min(ys) - 2, max([*ys, *(at for _, at in labels)]) + 1), title=title)
    axes.set(xlabel="backward transfer (0: nothing forgotten)", ylabel="learning accuracy, %")


def bars(axes: Any, tables: dict[str, dict[str, list[dict[str, Any]]]], names: list[str]) -> None:
    """AA of the variants, a bar a stream, with the standard deviation over seeds."""
    names = [name for name in names if any(len(results.get(name, ())) > 1 for results in tables.values())]
    height = 0.8 / len(tables)
    for n, (title, results) in enumerate(tables.items()):
        shown = [(k, results[name]) for k, name in enumerate(names) if len(results.get(name, ())) > 1]
        spread = [100 * statistics.stdev(r["average_accuracy"] for r in runs) for _, runs in shown]
        places = [k + n * height for k, _ in shown]
        axes.barh(places, [mean(runs, "average_accuracy") for _, runs in shown], height, xerr=spread, label=title)
    axes.set_yticks([k + 0.4 - height / 2 for k in range(len(names))], names, fontsize=8)
    axes.set(xlim=(45, 70), xlabel="AA, %", title="ablations (three seeds)")
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs" / "study.png")
    args = parser.parse_args()
    variants = yaml.safe_load((args.folder / "variants.yaml").read_text())
    tables = {name: json.loads((args.folder / name / "results.json").read_text()) for name in ("order1", "order2")}
    figure, axes = pyplot.subplots(1, 3, figsize=(17, 5.5))
    for place, (name, results) in zip(axes, tables.items(), strict=False):
        learnt = {k: r for k, r in results.items() if k not in variants and "learning_accuracy" in r[0]}
        scatter(place, learnt, f"{name}, encoder, budget small")
    bars(axes[2], tables, [OURS, *variants])
    figure.tight_layout()
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()

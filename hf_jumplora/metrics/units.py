"""Direction and unit of scores, by a metric's name and values: an accuracy of 0.9 is 90 %, a loss of 0.9 is a loss.

Less is better where the name ends in a word of `LOWER` ("loss", "validation_loss", "error_rate"), and more where it
begins with "neg"; transformers' own rule for `greater_is_better` knows "loss" alone.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


LOWER = frozenset((
    "loss", "entropy", "perplexity", "ppl", "nll", "error", "errors", "mse", "rmse", "mae", "mape", "wer",
    "cer", "ter", "eer", "brier", "distance", "divergence",
))  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """name: "%" of shares, whose values are in [-1, 1]; else that of the metric. sign: -1 where less is better."""

    name: str = "%"
    sign: int = 1

    @property
    def share(self) -> bool:
        """Whether scores are written in per cent."""
        return self.name == "%"

    def show(self, value: float | None, digits: int = 1, plus: str = "") -> str:
        """A score. digits: behind the point where it is in per cent. plus: "+" for a change."""
        if value is None:
            return "-"
        return f"{100 * value:{plus}.{digits}f}" if self.share else f"{value:{plus}.4f}"

    def lost(self, worse: float, before: float) -> tuple[float, str]:
        """(how much, in which words) of a score that is `worse` by so much: points of a share, else % of `before`."""
        return (100 * worse, "points") if self.share else (100 * worse / (abs(before) or 1), f"% of the {self.name}")


PERCENT = Unit()


def unit_of(metric: str | None, scores: Iterable[float | None]) -> Unit:
    """The unit of all scores of one task."""
    if metric and _less_is_better(metric):
        return Unit(metric, -1)
    share = all(score is None or abs(score) <= 1 for score in scores)
    return PERCENT if share else Unit(metric or "score")


def _less_is_better(metric: str) -> bool:
    words = re.sub(r"_(rate|score)$", "", metric.lower()).split("_")
    less = words[-1] in LOWER
    turned = words[0] in ("neg", "negative") and (less or words[-1] == "likelihood")  # scikit-learn's neg_log_loss
    return less != turned


def units(
    matrix: Sequence[Sequence[float | None]], tasks: Sequence[str], metrics: Mapping[str, str | None]
) -> list[Unit]:
    """The unit of each column of an accuracy matrix; metrics: {task: what is measured on it}."""
    return [unit_of(metrics.get(task), (row[j] for row in matrix)) for j, task in enumerate(tasks)]


def units_of(result: Mapping[str, Any]) -> list[Unit]:
    """[`units`] of the content of metrics.json."""
    return units(result["matrix"], result["tasks"], {info["name"]: info["metric"] for info in result.get("data", ())})


def common(found: Iterable[Unit]) -> Unit | None:
    """The unit of an average; None where units differ, and there is no average."""
    different = set(found)
    return different.pop() if len(different) == 1 else None

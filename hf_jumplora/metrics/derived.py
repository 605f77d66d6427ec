"""The content of metrics.json: the accuracy matrix of a run and what follows from it, also before the last task."""

from collections.abc import Mapping
from typing import Any

from . import (
    FORMULAS,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer_gem,
    learning_accuracy,
)
from .units import common, units


def derive(
    matrix: list[list[float | None]],
    tasks: list[str],
    continual: bool,
    metrics: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """metrics.json: the matrix and what follows from it.

    matrix: [1 + trained stages][tasks], row 0 zero-shot. metrics: {task: what is measured on it}; none: accuracy.
    Before the last task, the formulas are taken over the tasks trained so far; there are none where units differ, and
    where less is better those that compare scores take their negatives, so that forgetting is what got worse.
    `continual=False` (joint training) has an average accuracy only.
    """
    result: dict[str, Any] = {"tasks": tasks, "matrix": matrix}
    seen = len(matrix) - 1
    unit = common(units(matrix, tasks, metrics or {}))
    if seen and unit and not continual:
        if None not in matrix[-1]:
            result["average_accuracy"] = average_accuracy(matrix[1:])
    elif seen and unit and all(matrix[i + 1][j] is not None for i in range(seen) for j in range(i + 1)):
        a = [row[:seen] for row in matrix[1:]]
        result["average_accuracy"] = average_accuracy(a)
        result["learning_accuracy"] = learning_accuracy(a)
        if seen > 1:
            z, *a = [[None if x is None else unit.sign * x for x in row[:seen]] for row in matrix]
            result["backward_transfer"] = backward_transfer(a)
            result["forgetting"] = forgetting(a)
            if None not in z and all(a[j - 1][j] is not None for j in range(1, seen)):
                result["forward_transfer_gem"] = forward_transfer_gem(a, z)  # type: ignore[arg-type]
    negative = "" if unit is None or unit.sign > 0 else f", a and z: -{unit.name}"
    result["formulas"] = {
        name: text + ("" if "accuracy" in name else negative) for name, text in FORMULAS.items() if name in result
    }
    return result

"""The content of metrics.json: the accuracy matrix of a run and what follows from it, also before the last task."""

from typing import Any

from . import (
    FORMULAS,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer_gem,
    learning_accuracy,
)


def derive(matrix: list[list[float | None]], tasks: list[str], continual: bool) -> dict[str, Any]:
    """metrics.json: the matrix and what follows from it.

    matrix: [1 + trained stages][tasks], accuracies in [0, 1], row 0 zero-shot. Before the last task, the formulas are
    taken over the tasks trained so far. `continual=False` (joint training) has an average accuracy only.
    """
    result: dict[str, Any] = {"tasks": tasks, "matrix": matrix}
    seen = len(matrix) - 1
    if not continual:
        if seen and None not in matrix[-1]:
            result["average_accuracy"] = average_accuracy(matrix[1:])
    elif seen and all(matrix[i + 1][j] is not None for i in range(seen) for j in range(i + 1)):
        a, zero_shot = [row[:seen] for row in matrix[1:]], matrix[0][:seen]
        result["average_accuracy"] = average_accuracy(a)
        result["learning_accuracy"] = learning_accuracy(a)
        if seen > 1:
            result["backward_transfer"] = backward_transfer(a)
            result["forgetting"] = forgetting(a)
            if None not in zero_shot and all(a[j - 1][j] is not None for j in range(1, seen)):
                result["forward_transfer_gem"] = forward_transfer_gem(a, zero_shot)  # type: ignore[arg-type]
    result["formulas"] = {name: text for name, text in FORMULAS.items() if name in result}
    return result

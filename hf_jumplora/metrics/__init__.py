"""The named formulas of continual learning as pure functions of the accuracy matrix. Imports nothing of ours.

a[i][j]: score on task j after training task i (0-based); z[j]: before any training; u[j]: trained alone. Codebases
disagree on what BWT and FWT are called, so every function carries its formula.
"""

from collections.abc import Sequence


Matrix = Sequence[Sequence[float | None]]

FORMULAS = {
    "average_accuracy": "AA = mean_j a[T-1][j]",
    "backward_transfer": "BWT = mean_{j<T-1} (a[T-1][j] - a[j][j])",
    "forgetting": "mean_{j<T-1} (max_{i<T-1} a[i][j] - a[T-1][j])",
    "forward_transfer_gem": "FWT (GEM) = mean_{j>0} (a[j-1][j] - z[j])",
    "forward_transfer_scratch": "FWT (scratch) = mean_j (a[j][j] - u[j])",
    "forward_transfer_jumplora": "FWT (JumpLoRA code) = mean_j (a[T-1][j] - u[j])",
    "learning_accuracy": "mean_j a[j][j]",
}


def _mean(values) -> float:
    values = list(values)
    if not values:
        raise ValueError("this metric needs at least two tasks")
    return sum(values) / len(values)


def average_accuracy(a: Matrix) -> float:
    """AA = mean_j a[T-1][j]."""
    return _mean(a[-1])


def backward_transfer(a: Matrix) -> float:
    """BWT = mean_{j<T-1} (a[T-1][j] - a[j][j])."""
    return _mean(a[-1][j] - a[j][j] for j in range(len(a) - 1))  # type: ignore[operator]


def forgetting(a: Matrix) -> float:
    """mean_{j<T-1} (max_{i<T-1} a[i][j] - a[T-1][j]); tasks that were not evaluated yet (None) are left out."""
    best = (max(row[j] for row in a[:-1] if row[j] is not None) for j in range(len(a) - 1))  # type: ignore[type-var]
    return _mean(top - a[-1][j] for j, top in enumerate(best))  # type: ignore[operator]


def forward_transfer_gem(a: Matrix, z: Sequence[float]) -> float:
    """FWT (GEM) = mean_{j>0} (a[j-1][j] - z[j])."""
    return _mean(a[j - 1][j] - z[j] for j in range(1, len(a)))  # type: ignore[operator]


def forward_transfer_scratch(a: Matrix, u: Sequence[float]) -> float:
    """FWT (scratch) = mean_j (a[j][j] - u[j])."""
    return _mean(a[j][j] - u[j] for j in range(len(a)))  # type: ignore[operator]


def forward_transfer_jumplora(a: Matrix, u: Sequence[float]) -> float:
    """FWT (JumpLoRA code) = mean_j (a[T-1][j] - u[j])."""
    return _mean(a[-1][j] - u[j] for j in range(len(a)))  # type: ignore[operator]


def learning_accuracy(a: Matrix) -> float:
    """mean_j a[j][j]."""
    return _mean(a[j][j] for j in range(len(a)))


def collision_rate(shared: int, entries: int) -> float:
    """|S_i & S_j| / number of entries."""
    return shared / entries


def overlap(shared: int, size_i: int, size_j: int) -> float:
    """|S_i & S_j| / min(|S_i|, |S_j|); 0 when one of them is empty."""
    return shared / min(size_i, size_j) if min(size_i, size_j) else 0.0

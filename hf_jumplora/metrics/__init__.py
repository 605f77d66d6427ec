"""The named formulas of continual learning as pure functions of the accuracy matrix. Imports nothing of ours.

a[i][j]: score on task j after training task i (0-based); z[j]: before any training; u[j]: trained alone. Codebases
disagree on what BWT and FWT are called, so every function carries its formula.
"""

from collections.abc import Iterable, Sequence


Matrix = Sequence[Sequence[float | None]]

FORMULAS = {
    "average_accuracy": "AA = mean_j a[T-1][j]",
    "backward_transfer": "BWT = mean_{j<T-1} (a[T-1][j] - a[j][j])",
    "forgetting": "mean_{j<T-1} (max_{j<=i<T-1} a[i][j] - a[T-1][j])",
    "forward_transfer_gem": "FWT (GEM) = mean_{j>0} (a[j-1][j] - z[j])",
    "forward_transfer_scratch": "FWT (scratch) = mean_j (a[j][j] - u[j])",
    "forward_transfer_jumplora": "FWT (JumpLoRA code) = mean_j (a[T-1][j] - u[j])",
    "learning_accuracy": "mean_j a[j][j]",
}


def _mean(numbers: Iterable[float]) -> float:
    values = list(numbers)
    if not values:
        raise ValueError("this metric needs at least two tasks")
    return sum(values) / len(values)


def _score(a: Matrix, i: int, j: int) -> float:
    """a[i][j]. Raises ValueError when it was not evaluated."""
    value = a[i][j]
    if value is None:
        raise ValueError(f"task {j} was not evaluated after task {i % len(a)} (from 0): this metric needs it")
    return value


def average_accuracy(a: Matrix) -> float:
    """AA = mean_j a[T-1][j]."""
    return _mean(_score(a, -1, j) for j in range(len(a[-1])))


def backward_transfer(a: Matrix) -> float:
    """BWT = mean_{j<T-1} (a[T-1][j] - a[j][j])."""
    return _mean(_score(a, -1, j) - _score(a, j, j) for j in range(len(a) - 1))


def forgetting(a: Matrix) -> float:
    """mean_{j<T-1} (max_{j<=i<T-1} a[i][j] - a[T-1][j]): since task j was learned, whatever it scored before."""
    best = (max(_score(a, i, j) for i in range(j, len(a) - 1)) for j in range(len(a) - 1))
    return _mean(top - _score(a, -1, j) for j, top in enumerate(best))


def forward_transfer_gem(a: Matrix, z: Sequence[float]) -> float:
    """FWT (GEM) = mean_{j>0} (a[j-1][j] - z[j])."""
    return _mean(_score(a, j - 1, j) - z[j] for j in range(1, len(a)))


def forward_transfer_scratch(a: Matrix, u: Sequence[float]) -> float:
    """FWT (scratch) = mean_j (a[j][j] - u[j])."""
    return _mean(_score(a, j, j) - u[j] for j in range(len(a)))


def forward_transfer_jumplora(a: Matrix, u: Sequence[float]) -> float:
    """FWT (JumpLoRA code) = mean_j (a[T-1][j] - u[j])."""
    return _mean(_score(a, -1, j) - u[j] for j in range(len(a)))


def learning_accuracy(a: Matrix) -> float:
    """mean_j a[j][j]."""
    return _mean(_score(a, j, j) for j in range(len(a)))


def collision_rate(shared: int, entries: int) -> float:
    """|S_i & S_j| / number of entries."""
    return shared / entries


def overlap(shared: int, size_i: int, size_j: int) -> float:
    """|S_i & S_j| / min(|S_i|, |S_j|); 0 when one of them is empty."""
    return shared / min(size_i, size_j) if min(size_i, size_j) else 0.0

"""A smaller stack: each task's factors at a lower rank (LoRA-Squeeze, arXiv 2602.10993, after training)."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..tuner.model import rank_and_alpha
from .export import check_rank_or_energy, cut_factors
from .files import TaskFile
from .operations import open_tasks, write_stack


def squeeze(
    path: str | os.PathLike,
    out: str | os.PathLike,
    rank: int | None = None,
    energy: float | None = None,
    revision: str | None = None,
    min_energy: float = 0.9,
    force: bool = False,
    prefix: bool = False,
) -> dict[str, dict[str, tuple[int, float]]]:
    """Write a stack whose tasks have factors of a lower rank; {task: {layer: (rank, retained energy)}}.

    The supports stay as they are, bit by bit: densities, overlaps and hard isolation hold for the result. What is lost
    is in the values, and measured on the support: 1 - ||U - U'||^2 / ||U||^2 of a layer's update U. What a strategy
    remembers and the scores are not carried over, as in `subset`.

    Args:
        path, revision: as `load_stack`. out: an empty folder, or one to be made.
        rank: of every layer, at most its own. energy: instead of it, the fraction of ||B A||^2 to keep, layer by layer.
        prefix: take the first `rank` ranks at alpha / rank in place of the best ones: for ranks that were trained to be
            nested (method dylora).
        min_energy: refused when a task retains less over all its layers, unless `force`.

    Raises:
        ValueError: neither or both of `rank` and `energy`; `prefix` without a rank; too little energy is
        retained; or as `load_stack`.
    """
    check_rank_or_energy(rank, energy, min_energy)
    if prefix and rank is None:
        raise ValueError("the first of nested ranks are taken by their number: give a rank, not an energy")
    source, manifest, tasks = open_tasks(path, None, revision)
    rows: dict[str, dict[str, tuple[int, float]]] = {task.name: {} for task in tasks}
    by_folder = {task.folder: task for task in tasks}

    def cut(folder: str, target: Path, config: dict[str, Any], _: dict[str, Any]) -> str:
        task = by_folder[folder]
        tensors, row, retained = _cut_task(task, config, rank, energy, prefix)
        rows[task.name] = row
        if retained < min_energy and not force:
            raise ValueError(
                f"task {task.name!r} would retain {retained:.1%} of its update's energy, less than "
                f"min_energy={min_energy:.0%}: take a higher rank or energy, or force it; nothing was written"
            )
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        ranks = sorted({k for k, _ in row.values()})
        sizes = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"\nIts factors were cut to rank {sizes} after training; {retained:.2%} of the energy is retained.\n"

    said = "have a lower rank than there (each task's card)"
    write_stack(source, manifest, [task.folder for task in tasks], out, cut, said=said)
    return rows


def _cut_task(
    task: TaskFile, config: dict[str, Any], rank: int | None, energy: float | None, prefix: bool
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, float]], float]:
    """(all tensors of a task's file with cut factors, {layer: (rank, retained energy)}, that of all layers together);
    the ranks are written into `config`, in which every layer's scaling stays what it was."""
    tensors, row = task.tensors(), {}
    ranks, alphas, lost, total = {}, {}, 0.0, 0.0
    for layer in task.shapes:
        r, alpha = rank_and_alpha(task.config, layer)
        A, B = task.factors(layer)
        if prefix:
            kept = min(rank or r, r)
            A, B = A[:kept], B[:, :kept] * ((r / kept) ** 0.5 if task.config.use_rslora else r / kept)
        else:
            A, B, _ = cut_factors(A, B, rank, energy)
        before, after = task.update(layer), task.update(layer, (A, B))
        size = float(before.double().square().sum())
        change = float((before - after).double().square().sum())
        tensors[task.key(layer, "A")], tensors[task.key(layer, "B")] = A.contiguous(), B.contiguous()
        ranks[layer] = len(A)
        alphas[layer] = alpha * ((len(A) / r) ** 0.5 if task.config.use_rslora else len(A) / r)
        row[layer] = len(A), 1 - change / size if size else 1.0
        lost, total = lost + change, total + size
    config["rank_pattern"], config["alpha_pattern"] = ranks, alphas
    return tensors, row, 1 - lost / total if total else 1.0

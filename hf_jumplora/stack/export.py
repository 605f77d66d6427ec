"""Exports for servers that do not know this package: plain LoRA adapters of best rank, and sparse values."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file

from ..schema import read_json
from ..tuner.rank_routing import refuse_competing
from .files import TaskFile, refuse_full_weights, total_update
from .load import check_one_model
from .operations import check_empty_folder, new_folder, open_tasks
from .verify import name_in_errors


_EXACT = 512  # up to this size a full SVD is quick


def low_rank(
    M: torch.Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best approximation of M [out, in] by a product B A: (A [k, in], B [out, k], retained energy).

    `rank` fixes k; `energy` takes the smallest k that retains this fraction of ||M||_F^2. Large matrices go through a
    randomised SVD (Halko, Martinsson & Tropp 2011) with a fixed seed. The retained energy, 1 - ||M - B A||^2 / ||M||^2,
    is measured on the result.
    """
    size, total = min(M.shape), float(M.double().square().sum())
    if not total:
        k = min(rank or 1, size)
        return M.new_zeros(k, M.shape[1]), M.new_zeros(M.shape[0], k), 1.0
    width = size if size <= _EXACT or (energy is not None and energy >= 1) else min(size, (rank or 32) + 16)
    while True:
        if 2 * width >= size:
            U, S, Vh = torch.linalg.svd(M, full_matrices=False)
            width = size
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                U, S, V = torch.svd_lowrank(M, q=width, niter=4)
            Vh = V.T
        if energy is None:
            k = min(rank or 1, size)
            break
        kept = S.double().square().cumsum(0) / total
        k = int((kept < energy).sum()) + 1
        if k <= width - (0 if width == size else 8):  # the last few of a randomised SVD are less exact
            break
        if width == size:
            k = size
            break
        width = min(size, 2 * width)
    root = S[:k].sqrt()
    A, B = root[:, None] * Vh[:k], U[:, :k] * root
    return A, B, 1 - float((M - B @ A).double().square().sum()) / total


def cut_factors(
    A: torch.Tensor, B: torch.Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best approximation of B A by factors of a lower rank k: (A [k, in], B [out, k], retained energy).

    A [r, in], B [out, r]. From the singular values of the core R_B R_A^T [r, r] of thin QR decompositions, so that
    nothing of size [out, in] is made. `rank` fixes k (at most r); `energy` takes the smallest k that retains this
    fraction of ||B A||_F^2. In float64; the results are float32.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    total = float(S.square().sum())
    if not total:
        return A[:1].float() * 0, B[:, :1].float() * 0, 1.0
    kept = S.square().cumsum(0) / total
    k = min(rank, len(S)) if rank is not None else int((kept < (energy or 1.0) - 1e-12).sum()) + 1
    k = min(k, len(S))
    root = S[:k].sqrt()
    return ((Q_A @ Vh[:k].T) * root).T.float(), ((Q_B @ U[:, :k]) * root).float(), float(kept[k - 1])


def check_rank_or_energy(rank: int | None, energy: float | None, min_energy: float) -> None:
    """Raise ValueError unless one of `rank` and `energy` is given, and each has a value it can have."""
    if (rank is None) == (energy is None):
        raise ValueError("give a rank or an energy (--rank or --energy), one of the two")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise ValueError(f"rank is a positive integer and energy a fraction in (0, 1]; got rank={rank} energy={energy}")
    if not 0 <= min_energy <= 1:
        raise ValueError(f"min_energy is a fraction between 0 and 1, got {min_energy}")


def export_lora(
    path: str | os.PathLike,
    out: str | os.PathLike,
    rank: int | None = None,
    energy: float | None = None,
    tasks: list[str] | dict[str, float] | slice | None = None,
    revision: str | None = None,
    min_energy: float = 0.9,
    force: bool = False,
) -> dict[str, tuple[int, float]]:
    """Write the sum of the tasks' updates as one LoRA adapter that stock PEFT loads; {layer: (rank, retained energy)}.

    A masked product has no exact low rank, so something is lost; it is measured and returned, layer by layer.

    Args:
        path, tasks, revision: as `load_stack`. out: an empty folder, or one to be made.
        rank: of every layer. energy: instead of it, the fraction of each layer's ||update||^2 to keep.
        min_energy: the export is refused when all layers together retain less, unless `force`.

    Raises:
        ValueError: neither or both of `rank` and `energy`; too little energy is retained; or as `load_stack`.
    """
    check_rank_or_energy(rank, energy, min_energy)
    check_empty_folder(out)
    _, manifest, chosen = open_tasks(path, tasks, revision)
    check_one_model(manifest, chosen, path)
    refuse_full_weights(chosen, "a LoRA export")
    for task in chosen:
        refuse_competing(task.config.rank_routing, "a LoRA export")
    weights: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[int, float]] = {}
    lost = total = 0.0
    for layer in {layer: None for task in chosen for layer in task.shapes}:
        A, B, retained, size = _best(chosen, layer, rank, energy)
        for name, value in (("lora_A", A), ("lora_B", B)):
            weights[f"base_model.model.{layer}.{name}.weight"] = value.contiguous()
        lost, total = lost + (1 - retained) * size, total + size
        rows[layer] = (A.shape[0], retained)
    retained = 1 - lost / total if total else 1.0
    if retained < min_energy and not force:
        asked = f"energy={energy:g}" if rank is None else f"rank {rank}"
        raise ValueError(
            f"{asked} keeps {retained:.1%} of the updates' energy, less than min_energy={min_energy:.0%}: take a "
            "higher rank or energy, or force it; nothing was written"
        )
    with new_folder(out) as temporary:
        _lora_config(chosen, rows, manifest.base_model).save_pretrained(str(temporary))
        save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    return rows


def _best(
    tasks: list[TaskFile], layer: str, rank: int | None, energy: float | None
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """(A, B, retained energy, ||M||_F^2) of the sum M of the tasks' updates of a layer.

    Without gates M is a product already, that of the factors side by side: nothing of its size is made."""
    if any(task.config.gate for task in tasks):
        M = total_update(tasks, layer)
        return *low_rank(M, rank, energy), float(M.double().square().sum())
    factors = [(*task.factors(layer), task.scaling(layer)) for task in tasks if layer in task.shapes]
    A, B = torch.cat([A for A, _, _ in factors]).double(), torch.cat([s * B for _, B, s in factors], 1).double()
    return *cut_factors(A, B, rank, energy), float(((B.T @ B) * (A @ A.T)).sum())


def _lora_config(tasks: list[TaskFile], rows: dict[str, tuple[int, float]], base: dict[str, Any]) -> LoraConfig:
    ranks = {layer: rank for layer, (rank, _) in rows.items()}
    common = max(ranks.values())
    others = {layer: rank for layer, rank in ranks.items() if rank != common}
    selection = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    chosen = [{name: getattr(task.config, name) for name in selection} for task in tasks]
    same = all(choice == chosen[0] for choice in chosen) and chosen[0]["target_modules"] is not None
    return LoraConfig(
        r=common, lora_alpha=common,  # scaling = 1
        rank_pattern=others, alpha_pattern=dict(others), inference_mode=True,
        base_model_name_or_path=base["name_or_path"], revision=base["revision"],
        task_type=tasks[0].config.task_type, fan_in_fan_out=tasks[0].config.fan_in_fan_out,
        **(chosen[0] if same else {"target_modules": sorted(rows)}),
    )  # fmt: skip


def export_sparse(
    path: str | os.PathLike,
    out: str | os.PathLike,
    tasks: list[str] | dict[str, float] | slice | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, float]:
    """Write the sum of the tasks' updates as sparse rows: `sparse.safetensors`, read by [`read_sparse`].

    A layer has `values` [kept] in `dtype`, `columns` [kept] and `row_counts` [out] (uint16, int32 where a layer is
    wider than 65535), row by row: CSR with counts in place of pointers. Larger than the factors from a density of
    r (out + in) / (out * in) on, about 1 %.

    Returns {"kept": entries, "bytes": of the file, "bytes_per_nonzero": of the tensors}.

    Raises:
        ValueError: as `load_stack`, or a task holds modules trained in full.
    """
    check_empty_folder(out)
    _, manifest, chosen = open_tasks(path, tasks, revision)
    check_one_model(manifest, chosen, path)
    refuse_full_weights(chosen, "a sparse export")
    tensors: dict[str, torch.Tensor] = {}
    shapes = {layer: shape for task in chosen for layer, shape in task.shapes.items()}
    kept = 0
    for layer, shape in shapes.items():
        update = total_update(chosen, layer)
        rows, columns = update.nonzero(as_tuple=True)
        index = torch.uint16 if shape[1] < 1 << 16 else torch.int32
        tensors[f"{layer}.values"] = update[rows, columns].to(dtype)
        tensors[f"{layer}.columns"] = columns.to(index)
        tensors[f"{layer}.row_counts"] = torch.bincount(rows, minlength=shape[0]).to(index)
        kept += columns.numel()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    described = {
        "format": "pt", "shapes": json.dumps(shapes), "tasks": json.dumps([task.name for task in chosen]),
        "base_model": str(manifest.base_model["name_or_path"]),
    }  # fmt: skip
    with new_folder(out) as temporary:
        save_file(tensors, temporary / "sparse.safetensors", metadata=described)
        total = (temporary / "sparse.safetensors").stat().st_size
    return {"kept": kept, "bytes": total, "bytes_per_nonzero": size / kept if kept else 0.0}


def read_sparse(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """{layer: float32 CSR tensor [out, in]} of a folder written by [`export_sparse`]. To apply one to a base weight:
    `weight += update.to_dense()` (transposed for a Conv1D).

    Raises:
        ValueError: the file's tensors do not fit together.
    """
    name, updates = Path(path) / "sparse.safetensors", {}
    with name_in_errors(name), safe_open(name, "pt") as file:
        shapes = read_json(name, (file.metadata() or {}).get("shapes", "{}").encode())
        for layer, (out_features, in_features) in shapes.items():
            values, columns, counts = (file.get_tensor(f"{layer}.{n}") for n in ("values", "columns", "row_counts"))
            columns, pointers = columns.int(), torch.cat([torch.zeros(1, dtype=torch.int64), counts.long().cumsum(0)])
            whole = len(counts) == out_features and len(columns) == len(values) == int(pointers[-1])
            if not whole or (len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < in_features):
                raise ValueError(f"the tensors of {layer} do not fit together")
            shape = (out_features, in_features)
            updates[layer] = torch.sparse_csr_tensor(pointers.int(), columns, values.float(), shape)
    return updates

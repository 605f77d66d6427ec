"""A stack that was trained on a pruned base, for the whole one (LoRAM, arXiv 2502.13533)."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from ..ops.sparse import encode_support, support_sha256
from ..tuner.peft_compat import in_out_features
from .base import describe_base
from .files import TaskFile, refuse_full_weights
from .load import architecture_class
from .manifest import Manifest
from .operations import open_tasks, write_stack


def recover(
    path: str | os.PathLike,
    base_model: str | os.PathLike | nn.Module,
    keep: str | os.PathLike | dict[str, torch.Tensor],
    out: str | os.PathLike,
    revision: str | None = None,
) -> Manifest:
    """Write a stack for a whole base from one that was trained on a part of it: rows and columns of its weights.

    Each task's B [out, r] gets rows of zeros and A [r, in] columns of zeros where the pruned base has none, so that the
    update of a kept entry is what it was, and that of another is 0. Supports move with their entries.

    Args:
        path, revision: as `load_stack`. out: an empty folder, or one to be made.
        base_model: the whole base as a model, a folder or a Hub id. Its layers have the names of the pruned one's.
        keep: {"LAYER.rows": int64 [out of the pruned layer], "LAYER.columns": int64 [in of it]}, the places in the
            whole layer, or a safetensors file of them; what is not named is whole.

    Raises:
        ValueError: places that do not fit the two layers, a layer that the whole base has not, or a task that holds
        more than low-rank updates.
    """
    source, manifest, tasks = open_tasks(path, None, revision)
    refuse_full_weights(tasks, "another base")
    base = base_model if isinstance(base_model, nn.Module) else _load(base_model, manifest)
    if not isinstance(keep, dict):
        try:
            keep = load_file(keep)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{keep} is no safetensors file of the places that were kept ({error})") from error
    shapes = manifest.base_model["layers"]
    places = _places(base, shapes, keep)
    layers = {name: [places[name][2], places[name][3]] for name in shapes}
    larger = sum(o * i for o, i in layers.values()) / sum(o * i for o, i in shapes.values())
    by_folder, described = {task.folder: task for task in tasks}, describe_base(base)

    def widen(folder: str, target: Path, config: dict[str, Any], info: dict[str, Any]) -> str:
        task = by_folder[folder]
        tensors = _widened(task, places, config)
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        config["base_model_name_or_path"], config["revision"] = described["name_or_path"], described["revision"]
        if task.config.gate:  # shares of all entries, which are more
            info["density"] /= larger
            info |= {"collision": [share / larger for share in info.get("collision", [])]}
        return "\nIt was trained on a pruned base, and changes the entries that this one had.\n"

    folders, said = [task.folder for task in tasks], "are those of that stack, at their places in a larger base"
    return write_stack(source, manifest, folders, out, widen, {**described, "layers": layers}, said)


def _load(name: str | os.PathLike, manifest: Manifest) -> nn.Module:
    found = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or ["a model without a class"]
    if (architecture := architecture_class(found[0])) is None:
        raise ValueError(f"{name} is {found[0]}, no model class of transformers: pass the model itself as base_model=")
    return architecture.from_pretrained(name, dtype=manifest.base_model.get("dtype") or "auto")


_Places = tuple[torch.Tensor, torch.Tensor, int, int]  # rows, columns, out and in of the whole layer


def _places(base: nn.Module, shapes: dict[str, list[int]], keep: dict[str, torch.Tensor]) -> dict[str, _Places]:
    modules, found = dict(base.named_modules()), {}
    known = {f"{layer}.{side}" for layer in shapes for side in ("rows", "columns")}
    if unknown := sorted(keep.keys() - known):
        raise ValueError(f"keep names {unknown[0]!r}, which is no LAYER.rows or LAYER.columns of an adapted layer")
    for layer, pruned in shapes.items():
        if layer not in modules:
            raise ValueError(f"layer {layer} is not in the whole base: a pruned base has to keep its layers' names")
        in_features, out_features = in_out_features(modules[layer])
        sides = []
        for side, size, whole in (("rows", pruned[0], out_features or 0), ("columns", pruned[1], in_features or 0)):
            places = keep.get(f"{layer}.{side}", torch.arange(size if size == whole else 0))
            chosen = set(places.tolist()) if places.dtype == torch.int64 and places.shape == (size,) else set()
            if len(chosen) != size or not chosen <= set(range(whole)):
                raise ValueError(
                    f"layer {layer} has {size} {side} in the pruned base and {whole} in the whole one: "
                    f"'{layer}.{side}' must hold {size} different places below {whole}, int64"
                )
            sides.append(places)
        found[layer] = (sides[0], sides[1], out_features or 0, in_features or 0)
    return found


def _widened(task: TaskFile, places: dict[str, _Places], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a task's file with factors and supports of the whole layers, whose sha256 go into `config`."""
    tensors = task.tensors()
    for layer, (rows, columns, out_features, in_features) in places.items():
        A, B = task.factors(layer)
        tensors[task.key(layer, "A")] = A.new_zeros(len(A), in_features).index_copy_(1, columns, A)
        if (router := tensors.get(key := task.key(layer, "router"))) is not None:  # smora's, which reads what A reads
            tensors[key] = router.new_zeros(len(router), in_features).index_copy_(1, columns, router)
        tensors[task.key(layer, "B")] = B.new_zeros(out_features, len(A)).index_copy_(0, rows, B)
        if task.config.gate:
            mask = torch.zeros(out_features, in_features, dtype=torch.bool)
            mask[rows[:, None], columns] = task.support(layer)
            code = encode_support(mask)
            tensors[task.key(layer, "support")] = code
            config["support"][layer] = [code.numel(), support_sha256(code)]
    return tensors

"""Merging a stack into a plain model folder: the base's files are copied, each adapted weight is rewritten in place."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..disk import MANIFEST, copy_atomic, write_json
from ..schema import read_json, short
from .base import (
    MERGED,
    check_config,
    check_not_merged,
    check_shapes,
    differing_weights,
    merged_before,
    refuse_weights,
)
from .files import refuse_full_weights, total_update
from .load import architecture_class, check_one_model, hub_reason, named_base
from .manifest import Manifest
from .operations import check_empty_folder, new_folder, open_tasks
from .weights import identity, probe_differs, probe_values, untouched_weight


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OTHER_WEIGHTS = ("*.bin", "*.h5", "*.msgpack", "*.pt", "*.pth", "*.gguf", "*.onnx", "*/*")


class Shard:
    """The tensors of a safetensors file, read and rewritten one at a time."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, "pt"):  # checks the header: its length, and that the tensors lie in the file
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file ({error})") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.tensors = read_json(path, file.read(length))
        self.tensors.pop("__metadata__", None)
        self.start = 8 + length

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype.

        Raises:
            ValueError: its dtype is no float type, or the file ends too early.
        """
        entry = self.tensors[name]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{self.path}: {name} is {entry['dtype']}; only float weights can take a merge")
        first, last = entry["data_offsets"]
        with self.path.open("rb") as file:
            file.seek(self.start + first)
            content = bytearray(file.read(last - first))
        if len(content) != last - first:
            raise ValueError(f"{self.path} ends too early: {name} is not whole")
        return torch.frombuffer(content, dtype=_DTYPES[entry["dtype"]]).view(entry["shape"])

    def write(self, name: str, value: torch.Tensor) -> None:
        """Replace a tensor by one of the same dtype and shape."""
        with self.path.open("r+b") as file:
            file.seek(self.start + self.tensors[name]["data_offsets"][0])
            file.write(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())


def merge_stack(
    path: str | os.PathLike,
    out: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    tasks: list[str] | dict[str, float] | slice | None = None,
    revision: str | None = None,
) -> int:
    """Write the base model with the updates in its weights as a plain model folder; returns how many were changed.

    The base's shards are copied and each adapted weight is rewritten in the copy, round(W + float32 sum of the
    updates), the bits of `load_stack(merge=True)` in the base's own dtype. Memory: a few copies of one layer.

    Args:
        path: a folder or a Hub repository with a stack. out: an empty folder, or one to be made.
        base_model: folder or Hub id; None takes the one named in the manifest. tasks, revision: as `load_stack`.

    Raises:
        FileNotFoundError: no stack there. ValueError: as `load_stack`; the base has no safetensors files; a weight is
            not found under its name; or a task holds modules trained in full.
    """
    check_empty_folder(out)
    _, manifest, chosen = open_tasks(path, tasks, revision)
    check_one_model(manifest, chosen, path)
    refuse_full_weights(chosen, "a merge on disk")
    source = _base_folder(manifest, base_model, str(path))
    skeleton = _skeleton(manifest, source, str(path))
    shards = [Shard(file) for file in weight_files(source)]
    modules, folders = dict(skeleton.named_modules()), {task.folder for task in chosen}
    where = {layer: _find(shards, f"{layer}.weight", source) for task in chosen for layer in task.shapes}
    _check_weights(manifest, skeleton, shards, source, str(path))
    with new_folder(out) as temporary:
        for file in source.iterdir():  # not copied: files in folders, and weights that transformers does not load
            other = file.suffix == ".safetensors" and file not in [shard.path for shard in shards]
            if file.is_file() and not other and not any(file.match(pattern) for pattern in _OTHER_WEIGHTS[:-1]):
                copy_atomic(file, temporary / file.name)
        merged = merged_before(skeleton.config, [entry for entry in manifest.tasks if entry["folder"] in folders])
        config = read_json(source / "config.json")
        write_json(temporary / "config.json", {**config, MERGED: merged})
        copies = {shard.path: Shard(temporary / shard.path.name) for shard in shards}
        for layer, (shard, name) in where.items():
            weight = shard.read(name)
            delta = total_update(chosen, layer)
            delta = delta.T if isinstance(modules[layer], Conv1D) else delta
            touched = delta != 0
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight[touched] = (weight[touched].to(wide) + delta[touched]).to(weight.dtype)
            copies[shard.path].write(name, weight)
    return len(where)


def weight_files(source: Path) -> list[Path]:
    """The files that transformers loads a model's weights from: other .safetensors files beside them are none of it.

    Raises:
        ValueError: there is none, or the index names one that is not there.
    """
    index = source / "model.safetensors.index.json"
    if (source / "model.safetensors").is_file():
        return [source / "model.safetensors"]
    if not index.is_file():
        raise ValueError(f"{source} has no model.safetensors; save the base with save_pretrained() first")
    data = read_json(index)
    weights = data.get("weight_map") if isinstance(data, dict) else None
    names = (
        sorted(set(weights.values()))
        if isinstance(weights, dict) and all(isinstance(v, str) for v in weights.values())
        else []
    )
    if wrong := [name for name in names or [""] if Path(name).name != name or not (source / name).is_file()]:
        raise ValueError(f"{index} names {short(wrong[0])}, which is no file beside it")
    return [source / name for name in names]


def _base_folder(manifest: Manifest, base_model: str | os.PathLike | None, where: str) -> Path:
    given = base_model is not None
    name = str(base_model) if given else named_base(manifest, where)
    if os.path.isdir(name):
        return Path(name)
    revision = None if given else manifest.base_model["revision"]
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=list(_OTHER_WEIGHTS)))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        reason = hub_reason(error)
        raise ValueError(f"{where}: its base model {name} cannot be loaded; pass base_model= ({reason})") from error


def _skeleton(manifest: Manifest, source: Path, where: str) -> nn.Module:
    """The base without memory, after its architecture and shapes have been compared with the manifest's."""
    expected = manifest.base_model["architecture"]
    architecture = architecture_class(expected)
    if architecture is None:
        raise ValueError(f"{where}/{MANIFEST}: the base {expected} is no model class of transformers; use load_stack()")
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: its base model {source} cannot be loaded; pass base_model= ({error})") from error
    if expected not in (config.architectures or []):
        raise ValueError(f"{where} was trained on a {expected}; {source} is a {', '.join(config.architectures or [])}")
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{source} is quantised: merging would quantise the updates away. Pass the base in bf16 or float32 as "
            "base_model= (--base_model): the updates are added to its weights"
        )
    with torch.device("meta"):
        model = architecture(config)
    check_not_merged(manifest, config, where)
    check_shapes(manifest, model, where)
    check_config(manifest, config, where)
    return model


def _place(shards: list[Shard], name: str) -> tuple[Shard, str] | None:
    for wanted in (name, name.split(".", 1)[-1]):
        for shard in shards:
            if wanted in shard.tensors:
                return shard, wanted
    return None


def _find(shards: list[Shard], name: str, source: Path) -> tuple[Shard, str]:
    """The shard that holds a weight, and the weight's name there: the model's own, or without the model's prefix."""
    place = _place(shards, name)
    if place is not None:
        return place
    raise ValueError(
        f"{source} has no weight {name}: its files name it differently from the model. Use "
        "load_stack(..., merge=True).save_pretrained(...)"
    )


def _check_weights(manifest: Manifest, skeleton: nn.Module, shards: list[Shard], source: Path, where: str) -> None:
    """Raise ValueError unless the files hold the base's weights: all that they name as the model does."""
    if (expected := manifest.base_model.get("weights")) is not None:
        found: dict[str, Any] = {}
        for name, entry in expected.items():
            place = _place(shards, name)
            if entry is None or place is None:
                found[name] = None
                continue
            shard, key = place
            value = shard.read(key)
            dtype = getattr(torch, entry["dtype"]) if entry.get("xxh3") or entry.get("sha256") else None  # quantised
            rounds = dtype and torch.promote_types(value.dtype, dtype) == value.dtype  # as loading it in `dtype` did
            found[name] = identity(value.to(dtype) if rounds else value, entry)
        refuse_weights(manifest, differing_weights(expected, found), where)
        return
    name = untouched_weight(skeleton, manifest.base_model["layers"])
    if name is None:
        return
    shard, key = _find(shards, name, source)
    if probe_differs(manifest.base_model.get("probe", []), probe_values(shard.read(key))):
        raise ValueError(f"{where} was trained on {manifest.base_model['name_or_path']}; {source} has other weights")

"""Which base a stack stands on, by its weights and the config that shapes what it computes."""

import json
import os
from typing import TYPE_CHECKING, Any

from torch import nn

from ..tuner.peft_compat import in_out_features
from .weights import identity, named_tensors, probe_differs, same_weight, weight_probe


if TYPE_CHECKING:
    from .manifest import Manifest


MERGED = "hf_jumplora_merged"  # key of a merged model's config

# What a config holds beside what shapes a result: names, versions, the dtype (weights have their own), the form of the
# outputs, and what transformers sets in a model that runs: problem_type, and special tokens as the tokenizer has them.
_NO_RESULT = {
    "_name_or_path", "architectures", "id2label", "label2id", "auto_map", "transformers_version", "dtype",
    "torch_dtype", "quantization_config", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", MERGED,
}  # fmt: skip


def describe_base(base: nn.Module) -> dict[str, Any]:
    """What identifies a base model that holds no adapter yet. Every process must call it."""
    config = getattr(base, "config", None)
    name = base_name(base)
    return {
        "name_or_path": os.path.abspath(name) if name and os.path.isdir(name) else name,
        "revision": getattr(config, "_commit_hash", None),
        "architecture": type(base).__name__,
        "dtype": str(getattr(base, "dtype", "")).removeprefix("torch."),
        "weights": {name: None if t is None else identity(t) for name, t in named_tensors(base)},
        "config": result_config(config),
    }


def base_name(base: nn.Module) -> str:
    """Folder or Hub id that a model says it was loaded from; "" if it does not."""
    name = getattr(base, "name_or_path", None) or getattr(getattr(base, "config", None), "name_or_path", "")
    return name if isinstance(name, str) else ""


def result_config(config: Any) -> dict[str, Any]:
    """What shapes a result in the config of a model, as JSON has it; {} for a model without one."""
    return _shaping(json.loads(json.dumps(config.to_dict(), default=str))) if hasattr(config, "to_dict") else {}


def _shaping(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _shaping(v) if _is_config(v) else v for k, v in values.items() if k not in _NO_RESULT}


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and "model_type" in value


def config_differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs, in words. Keys that one of them lacks are those of another version of transformers."""
    differ = []
    for key in sorted(expected.keys() & found.keys()):
        if _is_config(expected[key]) and _is_config(found[key]):
            differ += [f"{key}.{text}" for text in config_differences(expected[key], found[key])]
        elif expected[key] != found[key]:
            differ.append(f"{key} is {expected[key]!r} there, {found[key]!r} here")
    return differ


def check_base(manifest: "Manifest", base: nn.Module, where: str) -> None:
    """Raise ValueError, naming what was expected and found, if `base` is not the model a stack was trained on.

    Weights of other dtypes than there, and quantised ones, are compared by sums (see `same_weight`). Stacks of earlier
    versions know their base by sixteen values of one weight.
    """
    expected = manifest.base_model
    if "_orig_mod" in {part for name, _ in base.named_modules() for part in name.split(".")}:
        raise ValueError(f"{where}: this base is compiled; pass the model itself and compile it with the tasks on it")
    if type(base).__name__ != expected["architecture"]:
        raise ValueError(f"{where} was trained on a {expected['architecture']}; this base is a {type(base).__name__}")
    revision = getattr(getattr(base, "config", None), "_commit_hash", None)
    if None not in (revision, expected["revision"]) and revision != expected["revision"]:
        raise ValueError(
            f"{where} was trained on revision {expected['revision']} of {expected['name_or_path']}; this is {revision}"
        )
    check_not_merged(manifest, getattr(base, "config", None), where)
    check_shapes(manifest, base, where)
    check_config(manifest, getattr(base, "config", None), where)
    if "weights" not in expected:
        if probe_differs(expected.get("probe", []), weight_probe(base, expected["layers"])):
            raise ValueError(f"{where} was trained on {expected['name_or_path']}; this base has other weights")
        return
    known = expected["weights"]
    found = {name: None if t is None else identity(t, known.get(name)) for name, t in named_tensors(base)}
    refuse_weights(manifest, differing_weights(expected["weights"], found), where)


def differing_weights(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs, in words. A weight quantised by an unknown library (None) is not compared; a tied one may
    have a second name."""
    differ = [f"{name} is missing" for name in expected if name not in found]
    values = [entry for entry in expected.values() if entry]
    for name, entry in found.items():
        there = expected.get(name)
        if entry is None or (name in expected and there is None):
            continue
        if there is None:
            if not any(same_weight(other, entry) for other in values):
                differ.append(f"{name} is one more weight")
        elif there["shape"] != entry["shape"]:
            differ.append(f"{name} has the shape {there['shape']} there, {entry['shape']} here")
        elif not same_weight(there, entry):
            differ.append(f"{name} has other values")
    return differ


def refuse_weights(manifest: "Manifest", differ: list[str], where: str) -> None:
    """Raise ValueError if anything differs."""
    if differ:
        name = manifest.base_model["name_or_path"] or "a model without a name"
        raise ValueError(
            f"{where} was trained on {name}; this base has other weights: {first(differ)}. Pass the model that it was "
            "trained on as base_model="
        )


def first(differ: list[str]) -> str:
    """The first three of some differences, and how many more there are."""
    return "; ".join(differ[:3]) + (f"; and {len(differ) - 3} more" if len(differ) > 3 else "")


def check_config(manifest: "Manifest", config: Any, where: str) -> None:
    """Raise ValueError, naming the keys, if a base would compute something else than the one of a stack did."""
    if differ := config_differences(manifest.base_model.get("config", {}), result_config(config)):
        raise ValueError(
            f"{where}: the config of its base was another one: {first(differ)}. Load the base with these values "
            "(from_pretrained takes them by name) and pass it as base_model="
        )


def merged_before(config: Any, tasks: list[dict[str, Any]]) -> list[str]:
    """What a merged model's config lists under `MERGED`: the adapters in its weights, by the sha256 of their files."""
    return [*(getattr(config, MERGED, None) or []), *(task["files"]["adapter_model.safetensors"] for task in tasks)]


def check_not_merged(manifest: "Manifest", config: Any, where: str) -> None:
    """Raise ValueError when a base has one of the stack's updates in its weights already: it would count twice."""
    merged = set(merged_before(config, []))
    for task in manifest.tasks:
        if task["files"]["adapter_model.safetensors"] in merged:
            raise ValueError(
                f"{where}: task {task['name']!r} is in the weights of this base already (a merged model); pass the "
                "base that the stack was trained on"
            )


def check_shapes(manifest: "Manifest", base: nn.Module, where: str) -> None:
    """Raise ValueError, naming the layer, unless the adapted layers are there and have the shapes of the manifest."""
    modules = dict(base.named_modules())
    for name, shape in manifest.base_model["layers"].items():
        found = _features(modules[name]) if name in modules else None
        if found != shape:
            raise ValueError(f"{where}: layer {name} should be [out, in] = {shape}, this base model has {found}")


def _features(module: nn.Module) -> list[int | None]:
    in_features, out_features = in_out_features(module)
    return [out_features, in_features]

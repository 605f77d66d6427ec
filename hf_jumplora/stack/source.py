"""Whether a base in memory is what the folder or Hub id that it names holds; if it is not, the run keeps a copy."""

import copy
import functools
import itertools
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..disk import name_write_errors, sync_folder
from ..tuner.model import gate_key
from .base import base_name, config_differences, first, result_config
from .merge import weight_files
from .quantised import Dequantised, comes_from, same_bytes
from .weights import digest, named_tensors


KEPT = "base"  # folder of a run's copy
# What these install is what a run, or loading a base in parts, needs: it computes the same, or is there again.
_LIBRARIES = frozenset((
    "accelerate", "bitsandbytes", "deepspeed", "hf_jumplora", "kernels", "liger_kernel", "peft", "torch",
    "transformers", "trl",
))  # fmt: skip
_FREE = frozenset(("training", "gradient_checkpointing", "max_seq_len_cached", "momentum"))  # they change with use
_SAVE = "save it, and its tokenizer, with save_pretrained(folder), load it from there, and start the run with that"


def check_in_memory(base: nn.Module) -> None:
    """Before a run: what neither the named source nor a copy could bring back when the stack is loaded.

    Raises:
        ValueError: the model is compiled, a part of it is offloaded, tokens were added to it, or a buffer that is
            computed from its config has other values; the message says what to do.
    """
    if "_orig_mod" in {part for name, _ in base.named_modules() for part in name.split(".")}:
        raise ValueError(
            "the base is compiled, or a part of it is, which gives its layers other names: pass the model itself, and "
            "torch_compile=True in the arguments"
        )
    if offloaded := [name for name, weight in base.named_parameters() if weight.is_meta]:
        raise ValueError(
            f"{offloaded[0]} is not in memory: device_map has offloaded it, and what is offloaded cannot be trained "
            "on. Load the base without device_map, quantised, or with recipes/accelerate/zero3_offload.yaml"
        )
    fresh = _new(base)
    check_whole(base, fresh)
    check_buffers(base, fresh)
    folder = source_folder(base)
    for text in _config_differences(base, folder) if folder else ():
        if re.match(r"config: (\w+\.)*vocab_size is", text):
            raise ValueError(
                f"the base has another vocabulary than {base_name(base)}, which it calls itself ({text}): {_SAVE}"
            )
    warn_of_modules(base, fresh)


def _new(base: nn.Module) -> nn.Module:
    """A new model of the base's class and config, its weights on the meta device; a base that is not one of
    transformers' is returned itself."""
    if not isinstance(base, PreTrainedModel):
        return base
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return type(base)(copy.deepcopy(base.config))


def check_whole(base: Any, fresh: nn.Module) -> None:
    """Raise ValueError, naming it, if `fresh`, a new model of the base's config, has a weight that the base has not, or
    if weights are tied in the base alone: a stack would later be refused as one of another base."""
    there = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    missing = [name for name, _ in fresh.named_parameters() if name not in there]
    if missing and not getattr(base, "is_quantized", False):  # whose weights have other names
        raise ValueError(
            f"the base has no {missing[0]}, which its config gives it: change the config too (num_hidden_layers, ...), "
            "or load the base again"
        )
    last = getattr(base.get_output_embeddings(), "weight", None) if isinstance(base, PreTrainedModel) else None
    tied = last is not None and last is getattr(base.get_input_embeddings(), "weight", None)
    if tied and getattr(base.config, "tie_word_embeddings", True) is False:
        raise ValueError(
            "the base's input and output embeddings are one weight, and its config says tie_word_embeddings=False: set "
            f"it to True, {_SAVE}"
        )


def warn_of_modules(base: nn.Module, fresh: nn.Module) -> None:
    """A warning of the first module that is not what it is in `fresh`, a new model, and that no file describes: another
    class (unless the base is quantised), another number among its attributes, a hook, a replaced `forward`."""
    there, quantised = dict(fresh.named_modules()), getattr(base, "is_quantized", False)
    for name, module in base.named_modules():
        new = there.get(name, module)
        what = f"is a {type(module).__name__}, in a new {type(base).__name__} a {type(new).__name__}"
        if type(module) is type(new):
            what = _changed(module, new)
        elif quantised:
            continue
        if what:
            warnings.warn(
                f"{name or 'the whole model'} of the base {what}. No file says so: where the stack is loaded, the base "
                "has what its config gives, unless you pass yours as base_model=",
                stacklevel=2,
            )
            return


def _changed(module: nn.Module, new: nn.Module) -> str:
    """What a module does otherwise than a `new` one of its class, in words; "": nothing that can be seen."""
    for key, value in vars(new).items():
        found, number = vars(module).get(key), type(value) in (bool, int, float)
        if number and key not in _FREE and not key.startswith("_") and type(found) is type(value) and found != value:
            return f"has {key}={found}, a new one {value}"
    known = {_defined(hook) for hook in _hooks(new)}
    for hook in _hooks(module):
        if (place := _defined(hook)) not in known and place[0] not in _LIBRARIES:
            return f"has the hook {'.'.join(place)}"
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    own = [vars(module).get(name) for name in ("forward", "_old_forward")]  # the second: below accelerate's hooks
    for forward in [*own, vars(owner)["forward"]]:
        if forward is not None and (place := _defined(forward))[0] not in {*_LIBRARIES, owner.__module__.split(".")[0]}:
            return f"has another forward, {'.'.join(place)}"
    return ""


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _defined(function: Any) -> tuple[str, str]:
    """(the package where a function is written, whatever it is wrapped in or calls itself; its name)."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    scope = getattr(function, "__globals__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return (scope["__name__"] if scope else type(function).__module__).split(".")[0], name


def check_buffers(base: nn.Module, fresh: nn.Module) -> None:
    """Compare what a model computes from its config (rotary frequencies) with what `fresh`, a new one, computes.

    Raises:
        ValueError: it differs: no file holds it. A cast alone is a warning.
    """
    saved = {name for name, _ in base.named_parameters()} | base.state_dict(keep_vars=True).keys()
    computed = {name: buffer for name, buffer in base.named_buffers() if name not in saved}
    known = dict(fresh.named_buffers())
    for name, found in computed.items():
        expected = known.get(name, found).to(found.device)
        if expected.shape != found.shape or not torch.allclose(expected.to(found.dtype), found, rtol=1e-4):
            raise ValueError(
                f"the buffer {name} of the base is not what its config gives, and no file holds it: change the "
                "config instead, or load the base again"
            )
        if expected.dtype != found.dtype:
            warnings.warn(
                f"the buffer {name} of the base was cast to {found.dtype}; a stack is loaded with {expected.dtype} "
                "there, and answers a little differently: load the base with from_pretrained(..., dtype=)",
                stacklevel=2,
            )


def source_folder(base: nn.Module) -> Path | None:
    """The folder with the safetensors files of the model that `base` calls itself; None without one on this disk, and
    for a model that is not transformers' own class: it may be made of one, and call itself that."""
    name = base_name(base)
    if not name or not isinstance(base, PreTrainedModel):
        return None
    found: Any = name
    if not os.path.isdir(name):
        revision = getattr(getattr(base, "config", None), "_commit_hash", None)
        files = ("model.safetensors", "model.safetensors.index.json")
        cached = (try_to_load_from_cache(name, file, revision=revision) for file in files)
        found = next((Path(path).parent for path in cached if isinstance(path, str)), None)
    try:
        return Path(found) if found and weight_files(Path(found)) else None
    except ValueError:  # no safetensors
        return None


def differences(base: nn.Module, folder: Path, known: dict[str, Any] | None = None) -> list[str]:
    """What a base in memory has other than the files of a folder, in words. Every process must call it. `known`: what
    its weights are known by (see [`identity`]), which spares reading them again.

    Values are compared in the dtype they have in memory, those that bitsandbytes has quantised in that form; weights
    quantised by other libraries are left out.
    """
    files = {key: file for path in weight_files(folder) for file in [safe_open(path, "pt")] for key in file.keys()}  # noqa: SIM118
    same: dict[int, list[str]] = {}  # names of tied weights
    for name, weight in base.named_parameters(remove_duplicate=False):
        same.setdefault(id(weight), []).append(name)
    tied = {found[0]: found for found in same.values()}
    prefix = f"{getattr(base, 'base_model_prefix', '')}."

    def stored(name: str) -> torch.Tensor | None:
        for own in tied.get(name, [name]):
            for key in (own, own.removeprefix(prefix), prefix + own):
                if key in files:
                    return files[key].get_tensor(key)
        return None

    def is_known(name: str, value: torch.Tensor) -> bool:
        entry, there = (known or {}).get(name), stored(name)
        if entry is None or there is None:
            return False
        return there.dtype == value.dtype and digest(there) == entry.get("xxh3")

    differ, rest = _config_differences(base, folder), {}
    for name, value in named_tensors(base):
        if isinstance(value, Dequantised):
            names = [name] if stored(name) is not None else [key for key, _ in _as_saved(base, {name: value.values})]
            if not any(comes_from(stored, key, value) for key in names):
                differ.append(f"{name} has other values (as {value.kind})")
        elif value is not None and not is_known(name, value) and not _equal(stored(name), value):
            rest[name] = value
    for name, value in _as_saved(base, rest):
        there = stored(name)
        if there is None:
            differ.append(f"{name} is not in its files")
        elif there.shape != value.shape:
            differ.append(f"{name} has the shape {[*there.shape]} there, {[*value.shape]} here")
        elif not _equal(there, value):
            differ.append(f"{name} has other values")
    return differ


def _as_saved(base: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by the names and in the form that files have: transformers joins experts and renames when it loads."""
    for _, block in itertools.groupby(weights, lambda name: gate_key(name, "block")):
        yield from revert_weight_conversion(base, {name: weights[name] for name in block}).items()  # type: ignore[arg-type]


def _config_differences(base: nn.Module, folder: Path) -> list[str]:
    config: Any = getattr(base, "config", None)
    if not (folder / "config.json").is_file():
        return []
    there = type(config).from_pretrained(str(folder))
    differ = config_differences(result_config(there), result_config(config))
    if type(base).__name__.endswith("SequenceClassification") and there.pad_token_id != config.pad_token_id:
        differ.append(f"pad_token_id is {there.pad_token_id} there, {config.pad_token_id} here")  # finds the last token
    return [f"config: {text}" for text in differ]


def _equal(there: torch.Tensor | None, value: torch.Tensor) -> bool:
    """Whether a file's value is that in memory, which may have been loaded in half precision and made wider again, as
    PEFT's `prepare_model_for_kbit_training` does."""
    if there is None or there.shape != value.shape:
        return False
    loaded = (value.dtype, torch.bfloat16, torch.float16) if value.is_floating_point() else (value.dtype,)
    return any(same_bytes(there.to(value.device, dtype).to(value.dtype), value) for dtype in loaded)


def keep_base(base: Any, differ: list[str], run: Path, tokenizer: Any) -> None:
    """Write a base that is not what it calls itself (`differ`) to `run`/base, whole or not at all, and check the copy.

    Raises:
        ValueError: it is quantised or spread over processes, or does not load again as it is. OSError: no room.
    """
    target, why = run / KEPT, f"the base in memory is not {base_name(base)}, which it calls itself: {first(differ)}"
    if getattr(base, "is_quantized", False) or any(map(_is_sharded, base.parameters())):
        raise ValueError(f"{why}. It is quantised or sharded and is not copied: {_SAVE}")
    if target.is_dir() and not differences(base, target):
        return
    warnings.warn(f"{why}. A copy in {target} is the base of this stack", stacklevel=2)
    temporary = run / f".{KEPT}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with name_write_errors(target):
            for part in (base, tokenizer):
                if part is not None:
                    part.save_pretrained(str(temporary))
            sync_folder(temporary, files=True)
        if lost := differences(base, temporary):
            raise ValueError(f"{why}. It cannot be saved so that it loads again as it is: {first(lost)}")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        sync_folder(run)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_sharded(weight: Any) -> bool:
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")

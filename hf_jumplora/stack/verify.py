"""What a stack's files must be before they are used: hashes of stack.json, configs, headers of the weights' files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..disk import MANIFEST, file_sha256
from ..schema import TaskFile, check, read_json, short
from ..tuner import JumpLoraConfig
from ..tuner.model import rank_and_alpha
from ..tuner.rank_routing import has_router
from .manifest import Manifest, read_manifest, stack_support_sha256
from .save import STRATEGIES


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Errors about what a task's file holds become a ValueError that names it: hashes may be right, tensors missing."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} does not fit the stack: {error}") from error


def task_config(folder: Path, task: dict[str, Any]) -> JumpLoraConfig:
    """The adapter config of a verified task, its scaling times the `weight` of a blend's entry. Raises ValueError that
    names the file if it is not the stack's, or holds weights trained in full, which cannot be weighted."""
    path = folder / task["folder"] / "adapter_config.json"
    with name_in_errors(path):
        config = JumpLoraConfig.from_pretrained(str(path.parent))
    if stack_support_sha256(config.support) != task["support_sha256"]:
        raise ValueError(f"{path}: its supports are not those of stack.json")
    if (weight := task.get("weight", 1.0)) != 1:
        if config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"{path}: the task has weights trained in full, which cannot be weighted: give it weight 1"
            )
        config.lora_alpha *= weight
        config.alpha_pattern = {layer: alpha * weight for layer, alpha in config.alpha_pattern.items()}
    return config


def check_task(folder: Path, task: dict[str, Any], manifest: Manifest) -> JumpLoraConfig:
    """The adapter config of a verified task, after the header of its weights' file was compared with it: hashes tell
    damage, and a stack that somebody made may have right ones. No tensor is read, and none of a claimed size is made.

    Raises:
        ValueError: the config is not the stack's; a tensor is missing, too many, or of another dtype or shape.
    """
    config, path = task_config(folder, task), folder / task["folder"] / "adapter_model.safetensors"
    with name_in_errors(path):
        expected = expected_tensors(config, manifest.base_model["layers"])
    with name_in_errors(path), safe_open(path, "pt") as file:
        found = {key: (file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    extra = [key for key in found if key not in expected and not _trained_in_full(key, config)]
    missing = [key for key in expected if key not in found]
    if missing or extra:
        raise ValueError(
            f"{path} does not fit: missing {short(missing[:3])}, unexpected {short(extra[:3])}: {MANIFEST} and its "
            "config say which layers it has"
        )
    for key, (dtype, shape) in expected.items():
        if found[key] != (dtype, shape):
            raise ValueError(
                f"{path} does not fit: {key} should be {dtype} {shape}, it is {found[key][0]} {found[key][1]}"
            )
    return config


def expected_tensors(config: JumpLoraConfig, layers: dict[str, list[int]]) -> dict[str, tuple[str, list[int]]]:
    """{name: (dtype, shape)} of the tensors in a finished task's file, as safetensors writes them."""
    expected: dict[str, tuple[str, list[int]]] = {}
    for name, (out_features, in_features) in layers.items():
        key, r = f"base_model.model.{name}.jumplora_", rank_and_alpha(config, name)[0]
        expected |= {f"{key}A": ("F32", [r, in_features]), f"{key}B": ("F32", [out_features, r])}
        if has_router(config.rank_routing):
            expected |= {f"{key}router": ("F32", [r, in_features]), f"{key}router_b": ("F32", [r])}
        if config.gate:
            if name not in (config.support or {}):
                raise ValueError(f"the config has no support of layer {name}")
            expected |= {f"{key}gate.{part}": ("F32", [1]) for part in ("log_tau", "mix")}
            expected[f"{key}support"] = ("U8", [config.support[name][0]])  # type: ignore[index]
    return expected


def _trained_in_full(key: str, config: JumpLoraConfig) -> bool:
    """Whether a tensor is of a module that the config names in `modules_to_save` or `trainable_token_indices`."""
    parts = key.removeprefix("base_model.model.").split(".")
    tokens = config.trainable_token_indices is not None and "trainable_tokens" in parts[-1]
    return not any(part.startswith("jumplora_") for part in parts) and (
        tokens or any(part in parts[:-1] for part in config.modules_to_save or ())
    )


def task_description(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """The content of a finished task's task.json. Raises ValueError, naming the file, unless it describes the task."""
    path = folder / task["folder"] / "task.json"
    info = check(TaskFile, path, read_json(path))
    if (info["name"], info["folder"]) != (task["name"], task["folder"]):
        raise ValueError(f"{path} does not describe task {task['name']!r}, which stack.json has in this folder")
    before = int(task["folder"][5:])
    if wrong := [key for key in ("collision", "overlap") if key in info and len(info[key]) != before]:
        raise ValueError(f"{path}: {wrong[0]} has {len(info[wrong[0]])} values for {before} earlier tasks")
    return info


def verify(folder: Path, task: dict[str, Any], skip: tuple[str, ...] = ()) -> None:
    """Raise ValueError, naming the file, unless every file of a task is there and has the sha256 of the manifest."""
    for name, expected in task["files"].items():
        if name not in skip:
            path = folder / task["folder"] / name
            if not path.is_file():
                raise ValueError(f"{path} is missing; stack.json lists it")
            _check_sha256(path, expected)


def state_file(folder: Path, tasks: list[dict[str, Any]]) -> Path | None:
    """What the strategies remembered after the last of these tasks, verified; None if they remembered nothing.

    Raises:
        ValueError: the file is missing or damaged.
    """
    last = tasks[-1]
    path = folder / last["folder"] / STRATEGIES
    if "state" not in last:  # older stacks list it among the files
        return path if STRATEGIES in last["files"] else None
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: it is what the method remembered of its tasks. A stack keeps it after its newest "
            "task only; if this is an earlier state of a repository (a tag whose push was late), take a newer one"
        )
    _check_sha256(path, last["state"])
    return path


def verify_stack(folder: str | os.PathLike) -> Manifest:
    """Check every file of a stack in a folder: stack.json, the tasks', and those beside stack.json that are there.

    Raises:
        FileNotFoundError: no stack there. ValueError: a file is missing or damaged; the message names it.
    """
    manifest = read_manifest(folder)
    for task in manifest.tasks:
        verify(Path(folder), task)
    if manifest.tasks:
        state_file(Path(folder), manifest.tasks)
    for name, expected in manifest.files.items():
        if (Path(folder) / name).is_file() and file_sha256(Path(folder) / name) != expected:
            raise ValueError(
                f"{Path(folder) / name} is damaged, or was changed since stack.json was written (by hand, or by a run "
                "that was killed meanwhile: start it again)"
            )
    return manifest


def _check_sha256(path: Path, expected: str) -> None:
    found = file_sha256(path)
    if found != expected:
        raise ValueError(f"{path} is damaged: its sha256 is {found}, stack.json says {expected}")

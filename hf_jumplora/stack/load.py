"""Loading a stack: whole, in part, or merged into a plain model."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from ..disk import MANIFEST
from ..tuner import fold_finished, named_layers
from ..tuner.gguf import as_plain_floats
from ..tuner.model import check_adapter_name
from ..tuner.rank_routing import refuse_competing
from .base import MERGED, check_base, merged_before
from .manifest import ROUTER, Manifest, is_folder, read_manifest
from .router import check_routed, read_router, route_prompts
from .save import STRATEGIES
from .verify import check_task, name_in_errors, task_config, verify


_REASONS = {
    HFValidationError: "a repository is named owner/name",
    RepositoryNotFoundError: "no such repository; for a private one log in with `hf auth login` or set HF_TOKEN",
    RevisionNotFoundError: "the repository has no such branch, tag or commit",
    LocalEntryNotFoundError: "the Hub cannot be reached, and it is not in the cache",
    EntryNotFoundError: "the repository does not hold it",
}
_LOOKUP = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")


def load_stack(
    path: str | os.PathLike,
    base_model: str | os.PathLike | nn.Module | None = None,
    tasks: list[str] | dict[str, float] | slice | None = None,
    revision: str | None = None,
    merge: bool = False,
    route: str | Callable[[torch.Tensor], torch.Tensor] | None = None,
    **model_kwargs: Any,
) -> nn.Module:
    """Load the tasks of a stack onto their base model.

    Args:
        path: a folder or a Hub repository that holds `stack.json`. Of a repository only the files of the chosen tasks
            are downloaded; once they are in the cache, loading works offline.
        base_model: the base as a model, a folder or a Hub id; None takes the one named in the manifest.
        tasks: names, or a slice of the task list; None takes all. Each task's update is additive: leaving one out
            removes exactly its update. {name: weight} blends: the sum of weight * update over these tasks, in the order
            of the stack.
        revision: of the repository; tag `task-002` is the stack after that task.
        merge: return the plain model with the updates in its weights instead of a `PeftModel`.
        route: "learned" has the router of the stack (`hf-jumplora router`) tell for each prompt which tasks act on it,
            and how much; they stay live, and what cannot be had without one sum is refused. A function in its place
            gets features [prompts, 2 hidden] (see `prompt_features`) and returns weights [prompts, tasks].
        model_kwargs: for `from_pretrained` of the base (device_map, quantization_config, ...). dtype: None takes the
            one in which the tasks were trained and evaluated.

    Returns:
        A `PeftModel` whose last task is active with the others as its parents. Over a float base the updates are
        merged into the weights (`unmerge_adapter` restores them bit for bit); over a quantised base they stay live.

    Raises:
        FileNotFoundError: no stack there. ValueError: an unknown task, a damaged file or another base model; the
            message names the file or layer, what was expected and what was found.
    """
    folder, manifest, chosen = open_stack(path, tasks, revision)
    if route is not None:
        if merge or isinstance(tasks, dict):
            raise ValueError(
                "route= weighs the tasks for each prompt: it goes with neither merge=True nor fixed weights"
            )
        choose = _weights_of_prompts(route, path, folder, manifest, chosen)
        model = attach(load_base(manifest, base_model, str(folder), **model_kwargs), folder, chosen, separate=True)
        route_prompts(model, [task["folder"] for task in chosen], choose)
        return model
    check_one_model(manifest, chosen, folder)
    base = load_base(manifest, base_model, str(folder), **model_kwargs)
    model = attach(base, folder, chosen)
    if not isinstance(tasks, dict):  # for switch_tasks, which knows no weights
        model.stack_tasks = {task["name"]: task["folder"] for task in chosen}  # type: ignore[assignment]
    if not merge:
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")  # they are, by `attach`
        plain = model.merge_and_unload()
    if hasattr(plain, "config"):
        setattr(plain.config, MERGED, merged_before(plain.config, chosen))
    return plain


def check_one_model(manifest: Manifest, chosen: Sequence[Any], where: str | os.PathLike) -> None:
    """Raise ValueError if the chosen tasks of a stack do not add up to one model."""
    if manifest.separate and len(chosen) != 1:
        raise ValueError(
            f"{where} was trained by {manifest.method!r}: each task has a model of its own, so take one with "
            f"tasks=[name]; it has {', '.join(manifest.task_names)}"
        )


def _weights_of_prompts(
    route: Any, path: str | os.PathLike, folder: Path, manifest: Manifest, chosen: list[dict[str, Any]]
) -> Callable[[torch.Tensor], torch.Tensor]:
    check_routed(manifest, str(folder))
    if callable(route):
        return route
    if route != "learned":
        raise ValueError(f"route is 'learned', a function or None, got {route!r}")
    if ROUTER in manifest.files and not os.path.isdir(path):
        download(path, folder, [ROUTER])
    return read_router(folder, manifest).only(chosen, str(folder))


def load_base(
    manifest: Manifest, base_model: str | os.PathLike | nn.Module | None, where: str, **model_kwargs: Any
) -> nn.Module:
    """The base model of a stack, checked: None loads the one that the manifest names.

    Raises:
        ValueError: it cannot be loaded, or is another model; the message names `where` the stack is.
    """
    if base_model is None:
        base_model = named_base(manifest, where)
        model_kwargs.setdefault("revision", manifest.base_model["revision"])
    dtype = manifest.base_model.get("dtype")
    if dtype in ("float64", "float32", "bfloat16", "float16") and not {"dtype", "torch_dtype"} & model_kwargs.keys():
        model_kwargs["dtype"] = dtype
    model_kwargs.setdefault("trust_remote_code", False)  # the default asks on the terminal, and `y` runs the code
    if isinstance(base_model, (str, os.PathLike)):
        architecture = architecture_class(manifest.base_model["architecture"])
        if architecture is None or not str(base_model):
            raise ValueError(
                f"{where}/{MANIFEST}: the base {manifest.base_model['architecture']} is no model class of transformers "
                "or has no name; pass the model itself as base_model="
            )
        lookup = {key: value for key, value in model_kwargs.items() if key in _LOOKUP}
        try:
            config = transformers.AutoConfig.from_pretrained(base_model, **lookup)
            # Loaded under this class, another kind of model would be filled up with defaults: seven billion weights.
            if isinstance(config, architecture.config_class):
                base_model = architecture.from_pretrained(base_model, **model_kwargs)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{where}: its base model {base_model} cannot be loaded; pass base_model= ({error})"
            ) from error
        if isinstance(base_model, (str, os.PathLike)):
            kind = ", ".join(config.architectures or [config.model_type])
            raise ValueError(f"{where} was trained on a {architecture.__name__}; {base_model} is a {kind}")
    assert isinstance(base_model, nn.Module)
    check_base(manifest, base_model, where)
    return as_plain_floats(base_model)


def architecture_class(name: str) -> Any:
    """The model class of transformers of this name, or None."""
    found = getattr(transformers, name, None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known and isinstance(getattr(found, "config_class", None), type) else None


def named_base(manifest: Manifest, where: str) -> str:
    """The folder or id of the base that a stack names; a run's own copy is found beside a stack that was moved.

    Raises:
        ValueError: it is a folder that is not there.
    """
    name: str = manifest.base_model["name_or_path"]
    if not is_folder(name) or os.path.isdir(name):
        return name
    beside = os.path.join(where, os.path.basename(name))
    if os.path.isdir(beside):
        return beside
    raise ValueError(
        f"{where}: its base model was loaded from a folder, {name}, which is not on this machine; pass base_model= "
        "(its folder or its id)"
    )


def open_stack(
    path: str | os.PathLike,
    tasks: list[str] | dict[str, float] | slice | None = None,
    revision: str | None = None,
) -> tuple[Path, Manifest, list[dict[str, Any]]]:
    """(folder, manifest, entries of the chosen tasks) of a folder or a Hub repository, verified; an entry of a blend
    has its `weight`.

    Of a repository, stack.json and the files that loading needs of the chosen tasks are downloaded, all of one commit.

    Raises:
        FileNotFoundError: no stack there. ValueError: as [`load_stack`].
    """
    folder, manifest = find_manifest(path, revision)
    chosen = _choose(manifest, tasks, folder)
    on_hub = not os.path.isdir(path)
    if on_hub:
        needed = [f"{task['folder']}/{name}" for task in chosen for name in task["files"] if name != STRATEGIES]
        download(path, folder, needed)
    for task in chosen:
        verify(folder, task, skip=(STRATEGIES,) if on_hub else ())  # older stacks list it among the files
        check_task(folder, task, manifest)
    return folder, manifest, chosen


def find_manifest(
    path: str | os.PathLike, revision: str | None = None, token: str | None = None
) -> tuple[Path, Manifest]:
    """The folder with a stack's stack.json, alone so far of a repository on the Hub, and its content.

    Raises:
        FileNotFoundError, ValueError: as [`open_stack`].
    """
    if os.path.isdir(path):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for a repository on the Hub; {path} is a folder")
        folder = Path(path)
    else:
        with hub_errors_as_missing(path, revision):
            folder = Path(hf_hub_download(str(path), MANIFEST, revision=revision, token=token)).parent
    return folder, read_manifest(folder)


def download(path: str | os.PathLike, folder: Path, names: list[str], token: str | None = None) -> None:
    """Bring files that stack.json lists into the cache beside it.

    Raises:
        FileNotFoundError: the Hub cannot be reached and not all of them are there.
    """
    try:  # the folder's name in the cache is the commit: the tag may move meanwhile
        snapshot_download(str(path), revision=folder.name, allow_patterns=names, token=token)
    except LocalEntryNotFoundError as error:
        parts = ", ".join(dict.fromkeys(name.split("/")[0] for name in names))
        raise FileNotFoundError(f"{path}: {parts} cannot be downloaded and not all is cached ({error})") from error


@contextmanager
def hub_errors_as_missing(path: str | os.PathLike, revision: str | None) -> Iterator[None]:
    """What the client says of a name that is no folder becomes a FileNotFoundError of one line."""
    try:
        yield
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(f"{path} is no folder, and no stack on the Hub{at} ({hub_reason(error)})") from error


def hub_reason(error: Exception) -> str:
    """Why the Hub did not give something, in words that say what to do."""
    return next((text for kind, text in _REASONS.items() if isinstance(error, kind)), str(error))


def attach(
    base: nn.Module, folder: Path, tasks: list[dict[str, Any]], separate: bool = False, fold: bool = False
) -> PeftModel:
    """Put verified tasks onto a base model or a PeftModel, each on top of the one before; the last one is active.

    separate: each on top of the base alone, and none merged. fold: keep the last one alone as an adapter, and the sum
    of the others (see [`fold_finished`]).
    """
    model: Any = base
    before: list[str] = []
    check_adapter_name(base, *(task["folder"] for task in tasks))
    for task in tasks:
        if fold and len(before) > 1:
            model.set_adapter(before[-1], inference_mode=True)
            fold_finished(model, before[-2:-1])
        config = task_config(folder, task)
        config.inference_mode, config.parent_adapters = True, [] if separate else list(before)
        before.append(task["folder"])
        with name_in_errors(folder / task["folder"] / "adapter_model.safetensors"):
            weights = load((folder / task["folder"] / "adapter_model.safetensors").read_bytes())
            if isinstance(model, PeftModel) and model.base_model.add_finished(task["folder"], config, weights):  # type: ignore[operator]
                continue
            if isinstance(model, PeftModel):
                model.add_adapter(task["folder"], config)
            else:
                model = PeftModel(model, config, adapter_name=task["folder"])
            result: Any = set_peft_model_state_dict(model, weights, adapter_name=task["folder"])
        missing = [key for key in result.missing_keys if f".{task['folder']}" in key]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"{folder / task['folder']}/adapter_model.safetensors does not fit: missing {missing[:3]}, "
                f"unexpected {result.unexpected_keys[:3]}"
            )
    model.set_adapter(before[-1], inference_mode=True)
    if fold and len(before) > 1:
        fold_finished(model, before[-2:-1])
    if not separate:
        merge_finished(model, before)
    return model.eval()


def merge_finished(model: PeftModel, adapters: list[str]) -> None:
    """Fold finished tasks into a float base, where they cost nothing; quantised or offloaded layers keep them live."""
    for _, layer in named_layers(model):
        routed = any(config.rank_routing is not None for config in layer.configs.values())
        if layer.quantization_backend is None and not layer.offloaded() and not routed:
            layer.finished.merge(adapters)


def _choose(
    manifest: Manifest, tasks: list[str] | dict[str, float] | slice | None, folder: Path
) -> list[dict[str, Any]]:
    if not manifest.tasks:
        raise ValueError(f"{folder}: the stack has no finished task yet")
    if not (manifest.additive or manifest.separate):
        if tasks is not None:
            raise ValueError(
                f"{folder} was trained by {manifest.method!r}: each of its folders holds the whole model after a task, "
                "so tasks cannot be chosen; load it without tasks="
            )
        return manifest.tasks[-1:]
    if tasks is None:
        return manifest.tasks
    refuse_competing(manifest.competing, "a choice of tasks")
    if isinstance(tasks, str):
        raise ValueError(f"tasks is a list of names or a slice, got {tasks!r}; for one task use tasks=[{tasks!r}]")
    if not isinstance(tasks, (slice, Iterable)):
        raise ValueError(f"tasks is a list of names or a slice, got {tasks!r}")
    weights = tasks if isinstance(tasks, dict) else {}
    _check_weights(weights)
    tasks = tasks if isinstance(tasks, slice) else list(tasks)
    if isinstance(tasks, slice):
        chosen = manifest.tasks[tasks]
    else:
        unknown = [name for name in tasks if name not in manifest.task_names]
        if unknown:
            raise ValueError(f"{folder} has no task {unknown[0]!r}; it has {', '.join(manifest.task_names)}")
        chosen = [task for task in manifest.tasks if task["name"] in tasks]
    if weights:
        chosen = [{**task, "weight": float(weights[task["name"]])} for task in chosen if weights[task["name"]]]
    if not chosen:
        raise ValueError(f"tasks={weights or tasks!r} chooses none of {', '.join(manifest.task_names)}")
    return chosen


def _check_weights(weights: dict[str, float]) -> None:
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight < math.inf:
            raise ValueError(
                f"the weight of task {name!r} is a finite number, 0 or more (0 leaves it out), got {weight!r}"
            )

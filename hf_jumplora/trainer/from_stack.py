"""From a stack to the plan of a run that adds tasks to it, on any machine."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig

from ..data import LanguageModelTask, Task, TextTask
from ..data.tasks import PastTask
from ..methods import get_method
from ..stack.load import load_base, looked_up, state_file, verify
from ..stack.manifest import MANIFEST, portable, read_manifest, write_atomic, write_json
from ..tuner import JumpLoraConfig
from .plan import RunPlan, check_tasks, make_plan
from .record import METRICS, RUN, task_settings


def find_stack(path: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a stack that can be continued; one on the Hub is downloaded.

    Raises:
        FileNotFoundError: no stack there. ValueError: it is no stack of a run.
    """
    if not Path(path).is_dir():
        wanted = [MANIFEST, METRICS, RUN, "task_*/*"]
        with looked_up(path, revision):
            source = Path(HfApi(token=token).snapshot_download(str(path), revision=revision, allow_patterns=wanted))
    elif revision is not None:
        raise ValueError(f"revision={revision!r} is for a repository on the Hub; {path} is a folder")
    else:
        source = Path(path)
    method = read_manifest(source).method
    if get_method(method).mode == "joint":
        raise ValueError(f"{path} was trained on all tasks at once ({method}); no task can be added to that")
    for name in (METRICS, RUN):
        if not (source / name).is_file():
            raise ValueError(f"{path} has no {name}, without which it cannot be continued")
    return source


def copy_stack(source: Path, folder: Path) -> None:
    """Copy a verified stack into `folder`, stack.json last.

    A folder that holds the stack already, or what a run has made of it since, is left as it is.

    Raises:
        ValueError: a damaged file, or `folder` holds another stack.
    """
    theirs = read_manifest(source)
    if (folder / MANIFEST).is_file():
        ours, same = portable(folder, read_manifest(folder))[0], portable(source, theirs)[0]
        if ours.tasks[: len(same.tasks)] != same.tasks:
            raise ValueError(f"{folder} holds another stack: use another output_dir")
        return
    for task in theirs.tasks:  # all of them first: nothing is left behind of a damaged stack
        verify(source, task)
    files = [f"{task['folder']}/{name}" for task in theirs.tasks for name in task["files"]]
    if (state := state_file(source, theirs.tasks)) is not None:
        files.append(str(state.relative_to(source)))
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    for name in (METRICS, RUN, MANIFEST):
        write_atomic(folder / name, (source / name).read_text(encoding="utf-8"))


def plan_from_stack(
    path: str | Path,
    tasks: list[Task],
    output_dir: str | Path,
    base_model: Any,
    processing_class: Any,
    revision: str | None,
    args_cls: type,
    options: dict[str, Any],
    **own: Any,
) -> RunPlan:
    """The plan of a run that adds tasks to the stack at `path`, which is copied to `output_dir`.

    Arguments and errors as of [`ContinualRun.from_stack`]; `own` are passed to [`make_plan`].
    """
    check_tasks(tasks)
    folder = Path(output_dir)
    with PartialState().main_process_first():  # the others find it in the cache
        source = find_stack(path, revision, options.get("hub_token"))
    manifest, settings = read_manifest(source), json.loads((source / RUN).read_text())
    stored = {key[5:]: value for key, value in settings.items() if key.startswith("args.")}
    known_args = {f.name for f in fields(args_cls) if f.init}
    differ = [
        f"args.{key}: {stored[key]!r} there, {value!r} now"
        for key, value in options.items()
        if key in stored and stored[key] != value
    ]
    if differ:
        raise ValueError(f"{path} was trained with other settings ({'; '.join(differ)}): leave them out")
    if ("eval_mode" in stored) != ("eval_mode" in known_args):  # a field of ours, which TRL's classes lack
        raise ValueError(
            f"{path} was not trained with {args_cls.__name__}: give args_cls=, and trainer_cls=, as it was trained with"
        )
    if not Path(path).is_dir() and options.get("push_to_hub"):
        options = {"hub_model_id": str(path), **options}
    # Before the base is loaded: DeepSpeed learns from them how to load it.
    args = args_cls(str(output_dir), **{**{k: v for k, v in stored.items() if k in known_args}, **options})
    how: dict[str, Any] = {}
    if not isinstance(base_model, nn.Module):
        how["dtype"] = getattr(torch, settings["base_dtype"].removeprefix("torch."))
        quantization = settings.get("quantization", {})
        if quantization.get("quant_method") == "bitsandbytes":  # by others, the base's own files are quantised
            how["quantization_config"] = BitsAndBytesConfig.from_dict(quantization)
    base_model = load_base(manifest, base_model, str(path), **how)
    with PartialState().main_process_first():  # the others find it there
        copy_stack(source, folder)

    manifest, settings = read_manifest(folder), json.loads((folder / RUN).read_text())
    known = task_settings(settings)
    names, given = manifest.task_names, {task.name: task for task in tasks}
    everything: list[Any] = [
        given.get(name, PastTask(name, digest=known[n].split()[-1])) for n, name in enumerate(names)
    ]
    everything += [task for task in tasks if task.name not in names]
    if PartialState().is_main_process:
        planned = [task for task in everything if not task.held_out]
        _forget_other_plans(folder, settings, planned, len(names))
    config = {key[8:]: value for key, value in settings.items() if key.startswith("adapter.")}
    settable = {f.name for f in fields(JumpLoraConfig) if f.init} - {"peft_type", "parent_adapters", "support"}
    if processing_class is None and any(isinstance(task, (TextTask, LanguageModelTask)) for task in tasks):
        processing_class = AutoTokenizer.from_pretrained(base_model.name_or_path)
    adapter = JumpLoraConfig(**{key: value for key, value in config.items() if key in settable})
    return make_plan(base_model, everything, manifest.method, args, processing_class, adapter_config=adapter, **own)


def _forget_other_plans(folder: Path, settings: dict[str, Any], tasks: list[Any], finished: int) -> None:
    """Take tasks that were planned, but neither trained nor given now, out of run.json and metrics.json."""
    known = task_settings(settings)
    keep = finished
    while keep < min(len(known), len(tasks)) and known[keep] == f"{tasks[keep].name} {tasks[keep].fingerprint()}":
        keep += 1
    if keep == len(known) or any(folder.glob("checkpoints/*/checkpoint-*")):
        return
    result = json.loads((folder / METRICS).read_text())
    result |= {"tasks": result["tasks"][:keep], "matrix": [row[:keep] for row in result["matrix"]]}
    write_json(folder / METRICS, result)
    dropped = {f"task {number}" for number in range(keep, len(known))}
    write_json(folder / RUN, {key: value for key, value in settings.items() if key not in dropped})

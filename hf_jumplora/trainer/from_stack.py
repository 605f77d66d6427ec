"""From a stack to the plan of a run that adds tasks to it, on any machine."""

from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig

from ..data import LanguageModelTask, Task, TextTask
from ..data.tasks import PastTask
from ..disk import MANIFEST, copy_atomic, file_sha256, read_sealed, sealed_path
from ..methods import GATE_OPTIONS, get_method
from ..schema import RunFile, check, check_adapter_config, short, stored_arguments
from ..stack.load import download, find_manifest, load_base
from ..stack.manifest import TOP_FILES, portable, read_manifest
from ..stack.save import STRATEGIES
from ..stack.verify import check_task, state_file, task_description, verify
from ..tuner import JumpLoraConfig
from .plan import RunPlan, check_tasks, make_plan
from .record import METRICS, RUN, in_use, read_metrics, rewrite, task_settings
from .task_trainer import ContinualSeq2SeqTrainer, ContinualTrainer


_TRAINERS = {cls.__name__: cls for cls in (ContinualTrainer, ContinualSeq2SeqTrainer)}


def find_stack(path: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a stack that can be continued; one on the Hub is downloaded.

    Raises:
        FileNotFoundError: no stack there. ValueError: it is no stack of a run.
    """
    source, manifest = find_manifest(path, revision, token)
    if not Path(path).is_dir():
        listed = [f"{task['folder']}/{name}" for task in manifest.tasks for name in task["files"]]
        last = manifest.tasks[-1:]
        download(path, source, [METRICS, RUN, *listed, *(f"{task['folder']}/{STRATEGIES}" for task in last)], token)
    method = manifest.method
    if get_method(method).mode == "joint":
        raise ValueError(f"{path} was trained on all tasks at once ({method}); no task can be added to that")
    for name in (METRICS, RUN):
        if not (source / name).is_file() and name not in manifest.files:
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
    files = [f"{task['folder']}/{name}" for task in theirs.tasks for name in task["files"]]
    if (state := state_file(source, theirs.tasks)) is not None:
        files.append(state.relative_to(source).as_posix())
    copies = {name: source / name for name in files} | {name: sealed_path(source, name) for name in (METRICS, RUN)}
    there = [*folder.glob("task_*"), *(folder / name for name in TOP_FILES)]
    for path in sorted(path for place in there for path in ([place] if place.is_file() else place.glob("*"))):
        name = path.relative_to(folder).as_posix()
        if not path.name.startswith(".") and (name not in copies or file_sha256(path) != file_sha256(copies[name])):
            raise ValueError(f"{folder} holds {name}, which would be replaced: use another output_dir")
    for name, path in copies.items():
        copy_atomic(path, folder / name)
    copy_atomic(source / MANIFEST, folder / MANIFEST)


def check_stack(source: Path) -> dict[str, Any]:
    """Check all of a stack that a run goes on from; returns its settings, the content of run.json.

    Raises:
        ValueError: a file is damaged, or is not what it should be; the message names it.
    """
    manifest = read_manifest(source)
    for task in manifest.tasks:
        verify(source, task)
        check_task(source, task, manifest)
        task_description(source, task)
    state_file(source, manifest.tasks)
    read_metrics(source)
    path = source / RUN
    settings = check(RunFile, path, read_sealed(source, RUN))
    names = [value.split()[0] for value in task_settings(settings)]
    if names[: len(manifest.tasks)] != manifest.task_names:
        raise ValueError(f"{path} is of the tasks {short(names)}, stack.json of {short(manifest.task_names)}")
    config = {key[8:]: value for key, value in settings.items() if key.startswith("adapter.")}
    check_adapter_config(path, config, JumpLoraConfig)
    return settings


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
        settings = check_stack(source)  # nothing is left behind of a damaged stack
    manifest, stored = read_manifest(source), stored_arguments(source / RUN, settings, args_cls)
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
        if dtype := settings["base_dtype"].removeprefix("torch."):  # "": the base had none
            how["dtype"] = getattr(torch, dtype)
        quantization = settings.get("quantization", {})
        if quantization.get("quant_method") == "bitsandbytes":  # by others, the base's own files are quantised
            how["quantization_config"] = BitsAndBytesConfig.from_dict(quantization)
    base_model = load_base(manifest, base_model, str(path), **how)
    with PartialState().main_process_first(), in_use(folder) if PartialState().is_main_process else nullcontext():
        copy_stack(source, folder)  # the others find it there
        manifest, settings = read_manifest(folder), read_sealed(folder, RUN)
        if PartialState().is_main_process:
            _forget_other_plans(folder, settings, tasks, manifest.task_names)

    known = task_settings(settings)
    names, given = manifest.task_names, {task.name: task for task in tasks}
    measured = {info["name"]: info["metric"] for info in (read_metrics(folder) or {}).get("data", ())}
    everything: list[Any] = [
        given.get(name, PastTask(name, metric=measured.get(name), digest=known[n].split()[-1]))
        for n, name in enumerate(names)
    ]
    everything += [task for task in tasks if task.name not in names]
    config = {key[8:]: value for key, value in settings.items() if key.startswith("adapter.")}
    settable = {f.name for f in fields(JumpLoraConfig) if f.init} - {"peft_type", "parent_adapters", "support"}
    if processing_class is None and any(isinstance(task, (TextTask, LanguageModelTask)) for task in tasks):
        processing_class = AutoTokenizer.from_pretrained(base_model.name_or_path, trust_remote_code=False)
    adapter = JumpLoraConfig(**{key: value for key, value in config.items() if key in settable})
    # What the stack's adapters are is what its run was told; without a gate, earlier versions took its options too.
    adapter.given = frozenset(settable - (set() if adapter.gate else GATE_OPTIONS))
    own["trainer_cls"] = own["trainer_cls"] or _TRAINERS.get(settings.get("trainer", ""), ContinualTrainer)
    return make_plan(base_model, everything, manifest.method, args, processing_class, adapter_config=adapter, **own)


def _forget_other_plans(folder: Path, settings: dict[str, Any], tasks: list[Any], finished: list[str]) -> None:
    """Take tasks that were planned, but neither trained nor given now, out of run.json and metrics.json."""
    known = task_settings(settings)
    planned = [task for task in tasks if not task.held_out and task.name not in finished]
    now = [
        {f"{task.name} {known_as}" for known_as in (task.fingerprint(), task.former_fingerprint())} for task in planned
    ]
    keep = len(finished)
    while keep < min(len(known), len(finished) + len(now)) and known[keep] in now[keep - len(finished)]:
        keep += 1
    if keep == len(known) or any(folder.glob("checkpoints/*/checkpoint-*")):
        return
    result = read_sealed(folder, METRICS)
    result |= {"tasks": result["tasks"][:keep], "matrix": [row[:keep] for row in result["matrix"]]}
    dropped = {f"{kind} {number}" for kind in ("task", "functions", "code") for number in range(keep, len(known))}
    rewrite(folder, {METRICS: result, RUN: {key: value for key, value in settings.items() if key not in dropped}})

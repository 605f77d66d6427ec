"""What a run keeps on disk beside the stack, so that the same command continues where it stopped."""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from .. import metrics as formulas
from ..hub import stack_card
from ..methods import get_method
from ..ops.sparse import decode_support
from ..report.report import PICTURES
from ..stack.manifest import MANIFEST, TOP_FILES, Manifest, read_manifest, write_atomic, write_json
from ..tuner import named_layers


try:
    import fcntl
except ImportError:  # not on Windows: there two runs in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

RUN = "run.json"
METRICS = "metrics.json"
PROCESSES = ("args.world_size", "args.sharding")  # settings that are a task's, not a run's


def task_settings(settings: dict[str, Any]) -> list[str]:
    """ "name fingerprint" of the tasks in run.json, in order."""
    count = sum(key.startswith("task ") for key in settings)
    return [settings[f"task {number}"] for number in range(count)]


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write run.json, or compare it with the one that is there. A run that trained nothing yet may change its settings;
    later ones may add tasks at the end. The number of processes may change from task to task, but not inside one.

    Raises:
        ValueError: the folder holds work of a run with other settings; the message says which differ and how.
    """
    path = folder / RUN
    settings = json.loads(json.dumps(settings, default=str))
    if not (folder / MANIFEST).is_file():
        _check_free(folder)
    if not (folder / MANIFEST).is_file() and not any(folder.glob("checkpoints/*/checkpoint-*")):
        if not path.is_file() or path.read_text() != json.dumps(settings, indent=2) + "\n":
            (folder / METRICS).unlink(missing_ok=True)
            write_json(path, settings)
        return
    if not path.is_file():
        raise ValueError(f"{folder} holds a stack but no {RUN}: it cannot be continued here; use another output_dir")
    try:
        before = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); use another output_dir") from error
    added = {key for key in settings if key.startswith("task ") and key not in before}
    finished = len(read_manifest(folder).tasks) if (folder / MANIFEST).is_file() else 0
    inside = sorted(folder.glob(f"checkpoints/task_{finished:03d}/checkpoint-*"))
    moved = [key for key in PROCESSES if key in before and before[key] != settings.get(key)]
    if inside and moved:
        raise ValueError(
            f"{folder} was interrupted inside a task ("
            + ", ".join(f"{key}: {before[key]!r} there, {settings.get(key)!r} now" for key in moved)
            + "). Checkpoints hold one part for each process, and the batches of a task depend on their number: go on "
            f"with the processes of before, or delete {inside[0].parent} to train this task again from its start. "
            "Between tasks the number of processes may change"
        )
    # The base is known by its weights (`check_base`): on another machine it may stand elsewhere.
    ignored = added | set(PROCESSES) | ({"base_model"} if finished else set())
    differ = [
        f"{key}: {before.get(key)!r} there, {settings.get(key)!r} now"
        for key in sorted({*before, *settings} - ignored)
        if before.get(key) != settings.get(key)
    ]
    if differ:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(differ)}). Use another output_dir, or the settings "
            "of that run to continue it; tasks can be added at the end of the list only"
        )
    if added and get_method(settings["method"]).mode == "joint":
        raise ValueError(f"{folder} was trained on all its tasks at once; no task can be added to that")
    if added or moved:
        write_json(path, {**before, **{key: settings[key] for key in settings if key in {*added, *moved}}})


def _check_free(folder: Path) -> None:
    """Raise ValueError when a folder without a stack holds files that a run would replace, and that are not a run's."""
    tasks = sorted(path.name for path in folder.glob("task_*"))
    if (folder / RUN).is_file():
        tasks = [name for name in tasks if name != "task_000"]  # killed before the manifest was written
        if tasks:
            raise ValueError(f"{folder} holds {tasks[0]} and no {MANIFEST}: put it back, or use another output_dir")
    elif found := [*tasks, *(name for name in (METRICS, *TOP_FILES) if (folder / name).exists())]:
        raise ValueError(f"{folder} holds {found[0]}, which is of no run and would be replaced: use another output_dir")


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """One run a folder at a time: two would replace each other's files. The lock goes with the process that held it.

    Raises:
        RuntimeError: another process trains in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another run is at work in {folder}: wait for it, or use another output_dir") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): see that no other run works in it", folder, error)
        yield
    finally:
        os.close(handle)


def read_matrix(folder: Path, tasks: int = 0) -> list[list[float | None]]:
    """The accuracy matrix so far, row 0 before any training; empty for a new run. None for `tasks` that were added."""
    path = folder / METRICS
    if not path.is_file():
        return []
    try:
        return [row + [None] * (tasks - len(row)) for row in json.loads(path.read_text())["matrix"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); use another output_dir") from error


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a task. Its trainer_state.json is written last, and not at once: a process that
    is killed meanwhile leaves an empty one."""

    def complete(path: Path) -> bool:
        try:
            return bool(json.loads(path.read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return False

    saved = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}") if complete(path)]
    return max(saved, key=lambda path: int(path.name.split("-")[1]), default=None)


def overlaps(model: nn.Module, stack: Path, index: int) -> dict[str, list[float]]:
    """Collision rate and overlap of the support of finished task number `index` with each earlier one's.

    The supports of the earlier tasks are read from the stack, one layer of one task at a time.
    """
    name = f"task_{index:03d}"
    shared, sizes, mine, entries = [0] * index, [0] * index, 0, 0
    with contextlib.ExitStack() as opened:
        paths = [stack / f"task_{k:03d}" / "adapter_model.safetensors" for k in range(index)]
        files = [opened.enter_context(safe_open(path, framework="pt")) for path in paths]
        for layer_name, layer in named_layers(model, name):
            support = layer.support(name).cpu()
            mine, entries = mine + int(support.sum()), entries + support.numel()
            for k, file in enumerate(files):
                code = file.get_tensor(f"base_model.model.{layer_name}.jumplora_support")
                other = decode_support(code, (layer.out_features, layer.in_features))
                sizes[k] += int(other.sum())
                shared[k] += int((other & support).sum())
    return {
        "collision": [formulas.collision_rate(shared[k], entries) for k in range(index)],
        "overlap": [formulas.overlap(shared[k], sizes[k], mine) for k in range(index)],
    }


def write_readme(folder: Path, manifest: Manifest, result: dict[str, Any], repo_id: str | None, args: Any) -> None:
    """The model card of a stack, from what stands beside it."""
    path = folder / RUN
    settings = json.loads(path.read_text()) if path.is_file() else {}
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    template = getattr(args, "model_card_template", None)
    write_atomic(folder / "README.md", stack_card(manifest, result, settings, repo_id or ".", pictures, template))


@contextlib.contextmanager
def explain_disk_errors(folder: Path, task: str) -> Iterator[None]:
    """An OSError while a finished task is written (no space left, a read-only folder) says what it leaves behind."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"{getattr(error, 'strerror', None) or error}: task {task!r} could not be written to {folder}. The stack "
            "there is whole without it; make room and run the same command again",
            getattr(error, "filename", None),
        ) from error

"""`RunFolder`: the files of a run and its stack, so that the same command continues where it stopped."""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..disk import (
    MANIFEST,
    finish_sealed,
    read_sealed,
    sealed_path,
    write_atomic,
    write_beside,
    write_json,
)
from ..hub import stack_card, task_card
from ..methods import get_method
from ..metrics.derived import derive
from ..report.folder import HISTORY, PREDICTIONS
from ..report.report import PICTURES, write_report
from ..schema import MetricsFile, RunFile, check, read_json
from ..stack.base import check_base, describe_base
from ..stack.manifest import (
    TOP_FILES,
    Manifest,
    layer_shapes,
    library_versions,
    read_manifest,
    write_manifest,
)
from ..stack.save import drop_states, save_task
from ..stack.source import KEPT, differences, keep_base, source_folder
from ..stack.verify import check_task, state_file, task_description, verify
from ..strategies.base import join_states
from ..tuner.lookup import adapter_config
from .arguments import argument
from .checkpoints import drop_checkpoints
from .plan import RunPlan
from .predictions import Answers, keep_own, write_answers
from .processes import on_main


try:
    import fcntl
except ImportError:  # not on Windows: there two runs in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

RUN = "run.json"
METRICS = "metrics.json"
PROCESSES = ("args.world_size", "args.sharding")  # settings that are a task's, not a run's


class RunFolder:
    """What a run has measured and finished, in memory and on disk; the only writer of its folder.

    matrix: a row before training and one after each task, [tasks]. general: with each row, {"task metric": score}.
    trained: task.json of each finished task. base: what stack.json says of the base model.
    manifest: None until the first task is finished.
    repo_id: the stack's name on the Hub, for the cards.
    """

    def __init__(self, plan: RunPlan):
        self.plan, self.path = plan, plan.output_dir
        self.matrix: list[list[float | None]] = []
        self.general: list[dict[str, float]] = []
        self.trained: list[dict[str, Any]] = []
        self.manifest: Manifest | None = None
        self.base: dict[str, Any] = {}
        self.repo_id = plan.args.hub_model_id if plan.args.push_to_hub else None

    @property
    def stack_tasks(self) -> list[dict[str, Any]]:
        """The entries of stack.json; none before the first task is finished."""
        return read_manifest(self.path).tasks if (self.path / MANIFEST).is_file() else []

    def checkpoints(self, index: int) -> Path:
        """The folder of the checkpoints of task number `index`."""
        return self.path / "checkpoints" / f"task_{index:03d}"

    def claim(self, settings: dict[str, Any]) -> None:
        """Write run.json, or compare it with the one that is there, and tidy up after a process that was killed.

        Raises:
            ValueError: the folder belongs to another run, see [`check_settings`].
        """
        check_settings(self.path, settings, self.plan.former_settings())
        drop_states(self.path, self.stack_tasks)

    def read(self, model: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        """What a former process measured and finished: (entries of stack.json, what the strategies remembered).

        model: the base.

        Raises:
            ValueError: a file is missing or damaged, or the base is another one.
        """
        tasks = self.stack_tasks
        result, count = read_metrics(self.path) or {}, len(self.plan.tasks)
        rows = result.get("matrix", [])[: len(tasks) + 1]
        self.matrix = [row + [None] * (count - len(row)) for row in rows]  # None for tasks that were added
        self.general, self.trained = self._known_general(result)[: len(rows)], []
        if not tasks:
            self.base = self._describe(model)
            return [], {}
        self.manifest = read_manifest(self.path)
        check_base(self.manifest, model, str(self.path))
        if len(self.matrix) != len(tasks) + 1:
            raise ValueError(
                f"{self.path / METRICS} lacks scores of the {len(tasks)} tasks in stack.json: restore it, "
                "or use another output_dir"
            )
        for task in tasks:
            verify(self.path, task)
            check_task(self.path, task, self.manifest)
            info = task_description(self.path, task)
            self.trained.append({key: info[key] for key in info if key not in ("folder", "support_sha256")})
        state = state_file(self.path, tasks)
        return tasks, {} if state is None else load_file(state)

    def _describe(self, model: Any) -> dict[str, Any]:
        """What stack.json says of the base. One that is not what it calls itself is copied into the run's folder."""
        described, source = describe_base(model), source_folder(model)
        if source is None:
            if described["name_or_path"]:
                why = "it is no model of transformers, or there are no safetensors files here"
                logger.warning("the base is not compared with %s: %s", described["name_or_path"], why)
        elif differ := differences(model, source, described["weights"]):
            on_main(lambda: keep_base(model, differ, self.path, self.plan.tokenizer))
            described |= {"name_or_path": str((self.path / KEPT).resolve()), "revision": None}
        return described

    def _known_general(self, result: dict[str, Any]) -> list[dict[str, float]]:
        """Of metrics.json; without the scores of held-out tasks that are other ones now."""
        before, now = result.get("held_out", {}), self._held_out()
        changed = {name for name in now if before.get(name) != now[name]}
        return [
            {key: value for key, value in row.items() if key.split()[0] not in changed}
            for row in result.get("general", [{}] * len(result.get("matrix", ())))
        ]

    def _held_out(self) -> dict[str, str]:
        return {task.name: task.fingerprint() for task in self.plan.held_out}

    def measured(self, stage: int, row: list[float | None], general: dict[str, float], answers: Answers) -> None:
        """Note what was measured after `stage` tasks; written with the next task, or by [`write`]. The answers to the
        tasks' rows are written now, those before training excepted, with which nothing is compared."""
        self.matrix[stage : stage + 1], self.general[stage : stage + 1] = [row], [general]
        if stage and PartialState().is_main_process:
            write_answers(self.path, self.plan.tasks, stage, answers)

    def finish(
        self, model: Any, index: int, info: dict[str, Any], row: list[float | None], general: dict, answers: Answers
    ) -> None:
        """Note a finished task in every process, and write it in the main one.

        model: holds it as adapter `task_00k`. info: for its task.json. row, general, answers: measured after it.
        """
        self.measured(index + 1, row, general, answers)
        self.trained.append(info)
        if self.manifest is None:
            separate = self.plan.method.mode == "separate"
            base = {**self.base, "layers": layer_shapes(model)}
            competing = adapter_config(model, f"task_{index:03d}").rank_routing is not None
            self.manifest = Manifest(
                base, self.plan.method.name, self.plan.additive, separate=separate, competing=competing
            )
        on_main(lambda: self._commit(model, f"task_{index:03d}"))
        if not PartialState().is_main_process:
            self.manifest = read_manifest(self.path)

    def _commit(self, model: Any, folder: str) -> None:
        """The manifest comes last: until then the stack on disk is the one before."""
        assert self.manifest is not None
        info = self.trained[-1]
        self.manifest.versions = library_versions()
        states = join_states(strategy.state_dict() for strategy in self.plan.strategies)
        card = task_card(self.manifest, info["name"], folder, info, self.repo_id or ".")
        with explain_disk_errors(self.path, info["name"]):
            entry = save_task(model, folder, info["name"], self.path, info, card, states)
            self.manifest.tasks.append(entry)
            self.write()
            drop_states(self.path, self.manifest.tasks)
            if (before := len(self.trained) - 1) > 0:
                keep_own(self.path, before, self.trained[before - 1]["name"])
        drop_checkpoints(self.path / "checkpoints")

    def write(self) -> dict[str, Any]:
        """Bring metrics.json, the report, the card and stack.json up to date; returns the content of metrics.json."""
        plan = self.plan
        metrics = {task.name: task.metric for task in plan.tasks}
        result = derive(self.matrix, list(metrics), plan.method.mode != "joint", metrics)
        result["method"] = plan.method.name
        result |= {"trained": self.trained, "data": plan.describe(), "general": self.general}
        result["held_out"] = self._held_out()
        if PartialState().is_main_process:
            write_beside(self.path, METRICS, result)
            write_report(self.path, result)
            if self.manifest is not None:
                self._write_card(result)
                write_manifest(self.path, self.manifest)
        return result

    def _write_card(self, result: dict[str, Any]) -> None:
        assert self.manifest is not None
        path = self.path / RUN
        settings = read_json(path) if path.is_file() else {}
        pictures = [name for name in PICTURES if (self.path / name).is_file()]
        template = argument(self.plan.args, "model_card_template")
        card = stack_card(self.manifest, result, settings, self.repo_id or ".", pictures, template)
        write_atomic(self.path / "README.md", card)


def task_settings(settings: dict[str, Any]) -> list[str]:
    """ "name fingerprint" of the tasks in run.json, in order."""
    count = sum(key.startswith("task ") for key in settings)
    return [settings[f"task {number}"] for number in range(count)]


def check_settings(folder: Path, settings: dict[str, Any], former: dict[str, Any]) -> None:
    """Write run.json, or compare it with the one that is there. A run that trained nothing yet may change its settings;
    later ones may add tasks at the end. The number of processes may change from task to task, but not inside one.

    former: see [`RunPlan.former_settings`].

    Raises:
        ValueError: the folder holds work of a run with other settings; the message says which differ and how.
    """
    path = folder / RUN
    settings, former = json.loads(json.dumps([settings, former], default=str))
    finish_sealed(folder, TOP_FILES)
    if not (folder / MANIFEST).is_file():
        _check_free(folder)
    if not (folder / MANIFEST).is_file() and not any(folder.glob("checkpoints/*/checkpoint-*")):
        if not path.is_file() or path.read_text() != json.dumps(settings, indent=2) + "\n":
            for name in (METRICS, HISTORY):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / PREDICTIONS, ignore_errors=True)
            write_json(path, settings)
        return
    if not path.is_file():
        raise ValueError(f"{folder} holds a stack but no {RUN}: it cannot be continued; use another output_dir")
    before = check(RunFile, path, read_sealed(folder, RUN))
    added = {key for key in settings if key.startswith("task ") and key not in before}
    if "trainer" not in before:  # by a version that stored fewer settings
        added |= settings.keys() - before.keys()
    # Of functions too; they are not known of a past task whose data is not available, nor their code in another Python.
    functions = [key for key in {*before, *settings} if key.startswith(("functions", "code"))]
    added |= {key for key in functions if key not in before}
    unknown = {key for key in functions if key not in settings or _other_python(before.get(key), settings[key])}
    finished = len(read_manifest(folder).tasks) if (folder / MANIFEST).is_file() else 0
    inside = sorted(folder.glob(f"checkpoints/task_{finished:03d}/checkpoint-*"))
    moved = [key for key in PROCESSES if key in before and before[key] != settings.get(key)]
    if inside and moved:
        raise ValueError(
            f"{folder} was interrupted inside a task ("
            + ", ".join(f"{key}: {before[key]!r} there, {settings.get(key)!r} now" for key in moved)
            + "). Checkpoints hold one part for each process, and the batches of a task depend on their number: use "
            f"as many processes as before, or delete {inside[0].parent} to train this task again from its start. "
            "Between tasks the number of processes may change"
        )
    # The base is known by its weights (`check_base`): on another machine it may stand elsewhere.
    ignored = added | unknown | set(PROCESSES) | ({"base_model"} if finished else set())
    for key in former:  # tasks by the fingerprints of then; training arguments that are not stored by their defaults
        if (key.startswith("task ") and before.get(key) == former[key]) or (
            key.startswith("args.") and before.get(key, former[key]) == settings.get(key, former[key])
        ):
            ignored.add(key)
    differ = [
        f"{key}: {before.get(key)!r} there, {settings.get(key)!r} now"
        for key in sorted({*before, *settings} - ignored, key=lambda key: (not key.startswith("task "), key))
        if before.get(key) != settings.get(key)
    ]
    if differ:
        shown = "; ".join([*differ[:5], *([f"and {len(differ) - 5} more"] if len(differ) > 5 else [])])
        raise ValueError(
            f"{folder} holds a run with other settings ({shown}). Use another output_dir, or the settings "
            "of that run to continue it; tasks can be added at the end of the list only"
        )
    if any(key.startswith("task ") for key in added) and get_method(settings["method"]).mode == "joint":
        raise ValueError(f"{folder} was trained on all its tasks at once; no task can be added to that")
    if added or moved:
        rewrite(folder, {RUN: {**before, **{key: settings[key] for key in settings if key in {*added, *moved}}}})


def _other_python(before: Any, now: Any) -> bool:
    """Whether these describe code (see `describe_code`) of two versions of Python."""
    return isinstance(before, str) and before.split()[:1] != now.split()[:1]


def rewrite(folder: Path, files: dict[str, Any]) -> None:
    """Change JSON files beside stack.json, {name: content}, under its seal: all of them or none.

    Raises:
        ValueError: one of the others is damaged; it would be sealed as it is.
    """
    for name in {RUN, METRICS} - files.keys():
        sealed_path(folder, name)
    for name, data in files.items():
        write_beside(folder, name, data)
    if (folder / MANIFEST).is_file():
        write_manifest(folder, read_manifest(folder))


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """The content of metrics.json, checked; None for a new run.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / METRICS
    if not path.is_file() and not (folder / MANIFEST).is_file():
        return None
    return check(MetricsFile, path, read_sealed(folder, METRICS))


def _check_free(folder: Path) -> None:
    """Raise ValueError when a folder without a stack holds files that a run would replace, and that are not a run's."""
    tasks = sorted(path.name for path in folder.glob("task_*"))
    if (folder / RUN).is_file():
        tasks = [name for name in tasks if name != "task_000"]  # killed before the manifest was written
        if tasks:
            raise ValueError(f"{folder} contains {tasks[0]} but no {MANIFEST}: restore it, or use another output_dir")
    elif found := [*tasks, *(name for name in (METRICS, *TOP_FILES) if (folder / name).exists())]:
        raise ValueError(
            f"{folder} contains {found[0]}, which belongs to no run and would be overwritten: use another output_dir"
        )


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
            raise RuntimeError(
                f"another process is already training in {folder}: wait for it, or use another output_dir"
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): make sure that no other process trains in it", folder, error)
        yield
    finally:
        os.close(handle)


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

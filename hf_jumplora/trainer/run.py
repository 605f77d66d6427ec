"""`ContinualRun`: a sequence of tasks, from the first to the last, through any number of restarts."""

import copy
import functools
import json
import logging
import shutil
import sys
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, set_seed

from ..data import Encoder, LanguageModelTask, Task, TextTask, collate
from ..data.tasks import check_tasks
from ..hub import Pusher, push_stack, task_card
from ..methods import get_method
from ..metrics.derived import derive
from ..report import table, write_report
from ..stack.load import attach, merge_finished, state_file, verify
from ..stack.manifest import (
    MANIFEST,
    Manifest,
    check_base,
    describe_base,
    library_versions,
    read_manifest,
    write_json,
    write_manifest,
)
from ..stack.save import drop_states, save_task
from ..strategies import Strategy
from ..strategies.base import join_states, state_of
from ..tuner import JumpLoraConfig, density, finish_adapter
from ..tuner.gguf import as_plain_floats
from .arguments import ContinualTrainingArguments
from .backend import call_strategies, cut_base, release, runnable
from .checks import check_run, encode_tasks, place_model, push_options, run_settings, stage_sizes, start_push
from .evaluator import describe_data, general_texts, lacks, measure, read_general, score
from .from_stack import complete_row, continued
from .processes import check_same_settings, check_shared_folder, on_main, sharding
from .record import (
    METRICS,
    RUN,
    check_settings,
    explain_disk_errors,
    in_use,
    newest_checkpoint,
    overlaps,
    read_matrix,
    write_readme,
)
from .scoring import own_adapter
from .task import new_adapter, task_trainer
from .task_trainer import ContinualTrainer


logger = logging.getLogger(__name__)


class ContinualRun:
    """Trains a model on tasks one after the other and keeps everything on disk, in `args.output_dir`.

    After each task: its adapter and support are written to the stack, all tasks are evaluated, `metrics.json`,
    `report.md` and the model card are brought up to date. `train()` on a folder that holds an interrupted run with the
    same settings continues at the task (inside a task: at the last checkpoint) and gives the same result.

    Args:
        model: the base model. It is changed in place (adapters are added, finished updates are merged into it).
        tasks: [`Task`], [`TextTask`] or [`LanguageModelTask`], in order. Those with `held_out=True` are no part of the
            sequence: they are evaluated before the first task and after each one (general ability in the report).
        method: a name of [`methods.METHODS`].
        args: [`ContinualTrainingArguments`]; they hold for each task. Of a task's steps, `save_steps` make checkpoints.
        processing_class: the tokenizer (needed for text tasks).
        trainer_cls: made by [`make_continual`]; default [`ContinualTrainer`].
        adapter_config: options of the adapters; the method's own prescriptions come on top.
        strategies: replaces the method's strategies (for other weights, or other combinations).
        data_collator, callbacks: passed on to each task's trainer.

    Raises:
        ValueError: anything that cannot work, before training starts; the message names the option, task or file.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: list[Task],
        method: str = "jumplora",
        args: ContinualTrainingArguments | None = None,
        processing_class: Any = None,
        *,
        trainer_cls: type = ContinualTrainer,
        adapter_config: JumpLoraConfig | None = None,
        strategies: list[Strategy] | None = None,
        data_collator: Any = None,
        callbacks: list | None = None,
    ):
        self.method, self.method_name = get_method(method), method
        check_tasks(tasks)
        self.model: Any = as_plain_floats(model)  # a PeftModel from the first task on
        self.held_out: list[Any] = [task for task in tasks if getattr(task, "held_out", False)]
        self.tasks = [task for task in tasks if not getattr(task, "held_out", False)]
        self.processing_class = processing_class
        self.args = args or ContinualTrainingArguments()
        self.trainer_cls, self.callbacks = trainer_cls, list(callbacks or ())
        self.config = self.method.adapter_config(adapter_config)
        self.strategies = [make() for make in self.method.strategies] if strategies is None else list(strategies)
        self.output_dir = Path(str(self.args.output_dir))
        check_run(self)
        self.seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        max_length = min(getattr(self.args, "max_length", 512), context or sys.maxsize)
        self.encoder = Encoder(processing_class, max_length, self.seq2seq)
        self.data_collator = data_collator
        if data_collator is None and any(not task.held_out for task in self._text_tasks()):
            self.data_collator = collate(processing_class, self.seq2seq)
        for strategy in self.strategies:
            if getattr(strategy, "general", None) is True:
                strategy.general = general_texts(self)  # type: ignore[attr-defined]
        self.manifest: Manifest | None = None
        self.matrix: list[list[float | None]] = []
        self.general: list[dict[str, float]] = []  # for each row of the matrix, see `measure`
        self.cross_entropy: dict[str, float] = {}  # nats a token of the plain texts just evaluated, by task
        self.info: list[dict[str, Any]] = []
        self.truncated: Counter[str] = Counter()
        self.pusher: Pusher | None = None
        self.repo_id = self.args.hub_model_id if self.args.push_to_hub else None

    @classmethod
    def from_stack(
        cls,
        path: str | Path,
        tasks: list[Task],
        output_dir: str | Path,
        *,
        base_model: str | Path | nn.Module | None = None,
        processing_class: Any = None,
        revision: str | None = None,
        trainer_cls: type = ContinualTrainer,
        args_cls: type = ContinualTrainingArguments,
        strategies: list[Strategy] | None = None,
        data_collator: Any = None,
        callbacks: list | None = None,
        **options: Any,
    ) -> "ContinualRun":
        """A run that adds tasks to a stack in a folder or on the Hub; `train()` gives what the uninterrupted run gave.

        Method, adapter config and training arguments are the stack's own (its run.json).

        Args:
            path: a folder, or a repository on the Hub (with push_to_hub=True the new tasks go there too).
            tasks: the new ones, in order. A task of the stack that is given again, unchanged, is evaluated again after
                each new one; without it its scores stay empty and so do the averages that need them.
            output_dir: where the stack is copied to and goes on. It may be `path` itself.
            base_model: a model, a folder or an id; None takes the one that the stack names.
            processing_class: None takes the base model's tokenizer. revision: of the repository.
            trainer_cls, args_cls: as the stack was trained with (`ContinualSFTTrainer` and `SFTConfig`).
            strategies: needed when the stack was trained with others than the method's own.
            options: further training arguments (push_to_hub, save_steps, ...).

        Raises:
            FileNotFoundError: no stack there. ValueError: anything that cannot work; a setting that differs from the
            stack's is named (by `train`).
        """
        model, everything, method, args, processing_class, config = continued(
            path, tasks, output_dir, base_model, processing_class, revision, args_cls, options
        )
        return cls(
            model, everything, method, args, processing_class, trainer_cls=trainer_cls, adapter_config=config,
            strategies=strategies, data_collator=data_collator, callbacks=callbacks,
        )  # fmt: skip

    def _text_tasks(self) -> list[Any]:
        return [task for task in (*self.tasks, *self.held_out) if isinstance(task, (TextTask, LanguageModelTask))]

    # ---- the sequence ---------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train all tasks that are not finished yet; returns the content of metrics.json.

        Raises:
            RuntimeError: an earlier call on this object was interrupted, or another run is at work in output_dir.
        """
        stages = stage_sizes(self)
        if isinstance(self.model, PeftModel):
            written = (self.output_dir / MANIFEST).is_file() and read_manifest(self.output_dir).tasks
            if not written or len(written) < len(stages):
                raise RuntimeError(
                    "training was interrupted and this model holds an adapter in the making: make a new ContinualRun "
                    "with a fresh base model, it continues from output_dir"
                )
            return self._write_metrics()
        settings = run_settings(self)
        check_same_settings(settings)
        with ExitStack() as held:
            on_main(lambda: self._prepare(settings, held))
            check_shared_folder(self.output_dir / RUN)
            return self._train(stages)

    def _prepare(self, settings: dict[str, Any], held: ExitStack) -> None:
        held.enter_context(in_use(self.output_dir))
        check_settings(self.output_dir, settings)
        if (self.output_dir / MANIFEST).is_file():  # killed before it could do so itself
            drop_states(self.output_dir, read_manifest(self.output_dir).tasks)
        self.pusher = start_push(self)
        if self.pusher is not None:
            held.callback(self.pusher.finish)

    def _train(self, stages: list[tuple[str, int]]) -> dict[str, Any]:
        train_sets = encode_tasks(self)
        cut_base(self.model, self.args)
        zero_shot = read_matrix(self.output_dir, len(self.tasks))[:1]
        self.general = read_general(self.output_dir, self)
        if not zero_shot or None in zero_shot[0] or lacks(self, self.general[0]):
            place_model(self)
        for row in zero_shot:
            complete_row(self, row, self.general[0])
        done = self._restore()
        PartialState().wait_for_everyone()  # all have read what the main process is about to change
        if done:
            self.matrix[0] = zero_shot[0]
            complete_row(self, self.matrix[done], self.general[done])
        if not self.matrix:
            self.matrix, self.general = [self.evaluate() if self._evaluates_all() else [None for _ in self.tasks]], [{}]
            measure(self, self.general[0])
            self._write_metrics()
        progress = tqdm(stages[done:], initial=done, total=len(stages), desc="tasks", disable=self._quiet())
        for index, (name, _) in enumerate(progress, start=done):
            progress.set_postfix_str(name)
            self._train_task(index, name, train_sets)
            if self.pusher is not None and self.args.hub_strategy != "end":
                self.pusher.push()
        result = self._write_metrics()
        if self.manifest is not None and len(self.manifest.tasks) > 1 and self._folds():
            # Training is over: the model gets its tasks back as adapters, as `load_stack` gives it.
            self.model = attach(self.model.unload(), self.output_dir, self.manifest.tasks)
        if PartialState().is_main_process:
            print(table(result, self.method_name))
        return result

    def _quiet(self) -> bool:
        return self.args.disable_tqdm or not PartialState().is_main_process

    def _evaluates_all(self) -> bool:
        return getattr(self.args, "eval_tasks", "all") == "all"

    def _restore(self) -> int:
        """Load what a former process finished; returns the number of finished stages."""
        if not (self.output_dir / MANIFEST).is_file():
            self.matrix = read_matrix(self.output_dir, len(self.tasks))[:1]
            return 0
        self.manifest = read_manifest(self.output_dir)
        check_base(self.manifest, self.model, str(self.output_dir))
        tasks = self.manifest.tasks
        self.matrix = read_matrix(self.output_dir, len(self.tasks))[: len(tasks) + 1]
        if len(self.matrix) != len(tasks) + 1:
            raise ValueError(
                f"{self.output_dir / METRICS} has no scores of all {len(tasks)} tasks that stack.json lists: put it "
                "back, or use another output_dir"
            )
        for task in tasks:
            verify(self.output_dir, task)
            info = json.loads((self.output_dir / task["folder"] / "task.json").read_text())
            self.info.append({key: info[key] for key in info if key not in ("folder", "support_sha256")})
        separate = self.manifest.separate
        tasks_now = tasks if self.manifest.additive or separate else tasks[-1:]
        self.model = attach(self.model, self.output_dir, tasks_now, separate, self._folds())
        if (state := state_file(self.output_dir, tasks)) is not None:
            saved = load_file(state)
            for number, strategy in enumerate(self.strategies):
                strategy.load_state_dict(state_of(number, saved))
        return len(tasks)

    def _folds(self) -> bool:
        """Whether earlier tasks are kept as their sum alone while a new one is trained."""
        return self.method.mode not in ("sequential", "separate") and not any(
            s.needs_past_factors for s in self.strategies
        )

    def _train_task(self, index: int, name: str, train_sets: list[Any]) -> None:
        start, main = time.perf_counter(), PartialState().is_main_process
        set_seed(self.args.seed + 1000 * index)
        self.model = new_adapter(self.model, copy.deepcopy(self.config), index, self.method.mode, self._folds())
        train_set = mixed = train_sets[index]
        for strategy in self.strategies:
            mixed = strategy.training_data(mixed, index, train_sets[:index])
        folder = f"task_{index:03d}"
        checkpoints = self.output_dir / "checkpoints" / folder
        before = set(self.model.peft_config)
        trainer = self._trainer(checkpoints, index, train_dataset=mixed)
        examples = functools.partial(trainer.examples, own=len(train_set))  # type: ignore[attr-defined]  # a mixin's
        call_strategies(self, "on_task_start", examples)
        last = newest_checkpoint(checkpoints)
        output = trainer.train(resume_from_checkpoint=str(last) if last else None)
        release(trainer)
        for extra in set(self.model.peft_config) - before:  # TRL's DPO keeps its reference as an adapter
            self.model.delete_adapter(extra)
        call_strategies(self, "on_task_end", examples)
        finish_adapter(self.model, "default", folder)
        if self.method.mode != "separate":
            merge_finished(self.model, [folder])
        self.matrix = [*self.matrix[: index + 1], self.evaluate(index + 1)]
        self.general = [*self.general[: index + 1], {}]
        measure(self, self.general[-1])
        task = self.tasks[index] if self.method.mode != "joint" else None
        self.info.append(
            {
                "name": name,
                "index": index,
                "density": density(self.model, folder),
                "steps": output.global_step,
                "train_examples": len(train_set),
                "truncated": self.truncated[name] if isinstance(task, TextTask) else None,
                "source": task.source if task else "",
                "labels": task.labels if isinstance(task, TextTask) else None,
                "instruction": task.instruction if isinstance(task, TextTask) else None,
                "seed": self.args.seed + 1000 * index,
                "effective_batch": self.args.train_batch_size
                * self.args.world_size
                * self.args.gradient_accumulation_steps,
                "processes": self.args.world_size,
                "sharding": sharding(self.args),
                "seconds": round(time.perf_counter() - start, 1),
                **(overlaps(self.model, self.output_dir, index) if self.config.gate and main else {}),
            }
        )
        if self.manifest is None:
            mode = self.method.mode
            additive = mode not in ("sequential", "separate")
            self.manifest = Manifest(describe_base(self.model), self.method_name, additive, separate=mode == "separate")
        on_main(lambda: self._commit(name, folder))
        if not main:
            self.manifest = read_manifest(self.output_dir)

    def _trainer(self, output_dir: Path, index: int, **kwargs) -> Trainer:
        return task_trainer(self, output_dir, index, **kwargs)

    # ---- what is known after a task -------------------------------------------------------------------------------

    def evaluate(self, seen: int | None = None) -> list[float | None]:
        """Scores of the model as it is on every task (None: no eval set, or not seen yet with eval_tasks="seen").

        With method `perlora` each task is scored with its own adapter, one that has none yet with the base model.
        """
        if self.manifest is None and (self.output_dir / MANIFEST).is_file():
            raise RuntimeError(f"{self.output_dir} holds finished tasks: call train() first, it loads them")
        limit = len(self.tasks) if seen is None or self._evaluates_all() or self.method.mode == "joint" else seen
        row: list[float | None] = []
        self.cross_entropy.clear()
        bar = tqdm(self.tasks, desc="evaluating", leave=False, disable=self._quiet())
        with runnable(self.model, self.args):
            for index, task in enumerate(bar):
                if index >= limit or task.eval_dataset is None:
                    row.append(None)
                    continue
                with own_adapter(self.model, index) if self.method.mode == "separate" else nullcontext():
                    row.append(score(self, task))
        return row

    def _commit(self, name: str, folder: str) -> None:
        """Write a finished task. The manifest comes last: until then the stack on disk is the one before."""
        assert self.manifest is not None
        self.manifest.versions = library_versions()
        states = join_states(strategy.state_dict() for strategy in self.strategies)
        card = task_card(self.manifest, name, folder, self.info[-1], self.repo_id or ".")
        with explain_disk_errors(self.output_dir, name):
            entry = save_task(self.model, folder, name, self.output_dir, self.info[-1], card, states)
            self.manifest.tasks.append(entry)
            self._write_metrics()
            drop_states(self.output_dir, self.manifest.tasks)
        shutil.rmtree(self.output_dir / "checkpoints", ignore_errors=True)

    def _write_metrics(self) -> dict[str, Any]:
        continual = self.method.mode != "joint"
        result = derive(self.matrix, [task.name for task in self.tasks], continual)
        result["method"] = self.method_name
        result |= {"trained": self.info, "data": describe_data(self), "general": self.general}
        result["held_out"] = {task.name: task.fingerprint() for task in self.held_out}
        if PartialState().is_main_process:
            write_json(self.output_dir / METRICS, result)
            write_report(self.output_dir, result)
            if self.manifest is not None:
                write_readme(self.output_dir, self.manifest, result, self.repo_id, self.args)
                write_manifest(self.output_dir, self.manifest)
        return result

    # ---- the Hub --------------------------------------------------------------------------------------------------

    def push_to_hub(self) -> dict[str, str]:
        """Push every finished task that the repository lacks; {tag: commit}. Raises what [`push_stack`] raises."""
        name = self.args.hub_model_id or self.output_dir.resolve().name
        return push_stack(self.output_dir, name, **push_options(self))

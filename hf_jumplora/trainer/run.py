"""`ContinualRun`: a sequence of tasks, from the first to the last, through any number of restarts."""

import copy
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import concatenate_datasets
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..data import Task, row_count
from ..data.encoder import encode_tasks
from ..hub import Pusher, push_options, push_stack, start_push
from ..methods import Method
from ..report.folder import read_run
from ..report.page import write_page
from ..report.report import table
from ..report.verdict import judge, verdict_text
from ..stack.load import attach
from ..strategies import Strategy
from ..strategies.base import state_of
from ..tuner import JumpLoraConfig
from .arguments import ContinualTrainingArguments
from .backend import place_model, shard_base
from .callbacks import ReportCallback, Sigterm
from .checks import check, check_steps
from .evaluator import Evaluator
from .from_stack import plan_from_stack
from .plan import RunPlan, make_plan
from .processes import check_same_settings, check_shared_folder, on_main, quiet
from .record import RUN, RunFolder, in_use
from .task import describe_task, train_task
from .task_trainer import ContinualTrainer


class RunOutput(Mapping):
    """What [`ContinualRun.train`] returns.

    metrics: the content of metrics.json: the accuracy matrix, the metrics derived from it with their formulas, general
    ability, and what is known of each task. The output can be used as this dict for one version, with a FutureWarning.
    """

    def __init__(self, metrics: dict[str, Any]):
        self.metrics = metrics

    def _old(self) -> dict[str, Any]:
        message = "ContinualRun.train() returns an output object: use train().metrics[...] in place of train()[...]"
        warnings.warn(message, FutureWarning, stacklevel=3)
        return self.metrics

    def __repr__(self) -> str:
        return f"RunOutput(metrics={self.metrics!r})"

    def __getitem__(self, key: str) -> Any:
        return self._old()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._old())

    def __len__(self) -> int:
        return len(self._old())


class ContinualRun:
    """Trains a model on tasks one after the other and keeps everything on disk, in `args.output_dir`.

    After each task: its adapter and support are written to the stack, all tasks are evaluated, `metrics.json`,
    `report.md` and the model card are brought up to date. `train()` on a folder that holds an interrupted run with the
    same settings continues at the task (inside a task: at the last checkpoint) and gives the same result.

    Args:
        model: the base model. It is changed in place (adapters are added, finished updates are merged into it).
        tasks: [`Task`], [`TextTask`] or [`LanguageModelTask`], in order. Those with `held_out=True` are no part of the
            sequence: they are evaluated before the first task and after each one (general ability in the report).
        method: a name of [`methods.METHODS`] or of an entry point `hf_jumplora.methods`; or a [`Method`].
        args: [`ContinualTrainingArguments`]; they hold for each task. Of a task's steps, `save_steps` make checkpoints.
        processing_class: the tokenizer (needed for text tasks).
        trainer_cls: made by [`make_continual`]; default [`ContinualTrainer`].
        adapter_config: options of the adapters; the method's own prescriptions come on top.
        strategies: options of the method's strategies (["kfac.weight=50"]), or [`Strategy`] objects in their place.
        data_collator, callbacks: passed on to each task's trainer.

    Attributes:
        model: the model as it is; a PeftModel from the first task on. plan: what is to be done ([`RunPlan`]).
        record: what was measured and written ([`RunFolder`]). evaluator: scores the model ([`Evaluator`]).

    Raises:
        ValueError: something cannot work; the message names the option, task or file, before training starts.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: list[Task],
        method: str | Method = "jumplora",
        args: ContinualTrainingArguments | None = None,
        processing_class: Any = None,
        *,
        trainer_cls: type = ContinualTrainer,
        adapter_config: JumpLoraConfig | None = None,
        strategies: list[Strategy] | list[str] | None = None,
        data_collator: Any = None,
        callbacks: list | None = None,
    ):
        more = {"strategies": strategies, "data_collator": data_collator, "callbacks": callbacks}
        options = {"trainer_cls": trainer_cls, "adapter_config": adapter_config, **more}
        self._follow(make_plan(model, tasks, method, args, processing_class, **options))

    def _follow(self, plan: RunPlan) -> None:
        check(plan)
        for number, strategy in enumerate(plan.strategies):
            if strategy.general is True:
                plan.strategies[number] = copy.copy(strategy)  # the same strategy in another run gets that one's text
                plan.strategies[number].general = plan.general_texts()
        self.plan, self.model = plan, plan.model
        self.args, self.output_dir = plan.args, plan.output_dir
        self.record = RunFolder(plan)
        self.reporter = ReportCallback(plan.args.report_to, str(plan.output_dir))
        plan.callbacks.append(self.reporter)
        self._sigterm = None
        if any(plan.trainer_of(task)[1].enable_jit_checkpoint for task in (None, *plan.tasks)):
            self._sigterm = Sigterm()
            plan.callbacks.append(self._sigterm)
        self.evaluator = Evaluator(plan)
        self.pusher: Pusher | None = None
        self.truncated: dict[str, int] = {}  # texts that were cut, by task

    # What a run was told, by the names it had before there was a plan; the plan is what counts, so none can be set.
    tasks = property(lambda self: self.plan.tasks)
    config = property(lambda self: self.plan.config)
    strategies = property(lambda self: self.plan.strategies)
    encoder = property(lambda self: self.plan.encoder)
    data_collator = property(lambda self: self.plan.batches)
    manifest = property(lambda self: self.record.manifest)

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
        trainer_cls: type | None = None,
        args_cls: type = ContinualTrainingArguments,
        strategies: list[Strategy] | list[str] | None = None,
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
            output_dir: where the stack is copied to and continued. It may be `path` itself.
            base_model: a model, a folder or an id; None takes the one that the stack names.
            processing_class: None takes the base model's tokenizer. revision: of the repository.
            trainer_cls, args_cls: as the stack was trained with, where those are not the package's own
                (`ContinualSFTTrainer` and `SFTConfig`).
            strategies: needed when the stack was trained with others than the method's own.
            options: further training arguments (push_to_hub, save_steps, ...).

        Raises:
            FileNotFoundError: no stack there. ValueError: something cannot work; a setting that differs from the
                stack's is named (by `train`).
        """
        run = cls.__new__(cls)
        own = {"strategies": strategies, "data_collator": data_collator, "callbacks": callbacks}
        given = (path, tasks, output_dir, base_model, processing_class, revision, args_cls, options)
        run._follow(plan_from_stack(*given, trainer_cls=trainer_cls, **own))
        return run

    def train(self) -> RunOutput:
        """Train all tasks that are not finished yet; `.metrics` of the result is the content of metrics.json.

        Raises:
            RuntimeError: an earlier call on this object was interrupted, a callback stopped a task, or another process
                trains in output_dir.
            KeyboardInterrupt: Ctrl-C, or with `enable_jit_checkpoint` SIGTERM, after a checkpoint; the same command
                continues.
        """
        if isinstance(self.model, PeftModel):
            if len(self.record.stack_tasks) < len(self.plan.stages()):
                raise RuntimeError(
                    "training was interrupted and this model contains a partially trained adapter: make a new "
                    "ContinualRun with a fresh base model, it continues from output_dir"
                )
            return RunOutput(self.record.write())
        settings = self.plan.settings()
        check_same_settings(settings)
        with ExitStack() as held:
            if self._sigterm is not None:
                held.enter_context(self._sigterm.heeded())
            on_main(lambda: self._open(settings, held))
            check_shared_folder(self.output_dir / RUN)
            return RunOutput(self._train())

    def _open(self, settings: dict[str, Any], held: ExitStack) -> None:
        """In the main process: the folder is this run's until `held` is closed, and pushing begins."""
        held.enter_context(in_use(self.output_dir))
        self.record.claim(settings)
        if self.args.push_to_hub:
            self.pusher = start_push(self.output_dir, self.args)
            self.record.repo_id = self.pusher.repo_id
            held.push(self.pusher.end)

    def _train(self) -> dict[str, Any]:
        plan, record, stages = self.plan, self.record, self.plan.stages()
        train_sets = self._encode()
        shard_base(self.model, self.args)
        done = self._restore()
        progress = tqdm(stages[done:], initial=done, total=len(stages), desc="tasks", disable=quiet(self.args))
        for index, (name, _) in enumerate(progress, start=done):
            progress.set_postfix_str(name)
            self._train_task(index, train_sets)
            if self.pusher is not None and self.args.hub_strategy != "end":
                self.pusher.push()
        result = record.write()
        if len(record.trained) > 1 and plan.folds:
            # Training is over: the model gets its tasks back as adapters, as `load_stack` gives it.
            self.model = attach(self.model.unload(), self.output_dir, record.stack_tasks)
        if PartialState().is_main_process:
            stored = read_run(self.output_dir)
            write_page(self.output_dir / "report.html", [stored])
            where = f"report: {self.output_dir / 'report.html'}"
            print(table(result, plan.method.name), verdict_text(judge(stored)), where, sep="\n\n")
        return result

    def _encode(self) -> list[Any]:
        """The training set of every stage; texts that cannot be used show now."""
        sets = encode_tasks(self.plan.encoder, self.plan.tasks, self.plan.held_out, self.model)
        self.truncated = dict(self.plan.encoder.truncated)  # before evaluation, which counts too
        sets = sets if self.plan.method.mode != "joint" else [concatenate_datasets(sets)]
        check_steps(self.plan, [row_count(rows) for rows in sets])
        for index, task in enumerate(self.plan.tasks):
            for strategy in task.strategies:  # none in joint training
                if sets[index] is not None:
                    strategy.training_data(sets[index], index, sets[:index])  # refuses rows before any task is trained
        return sets

    def _restore(self) -> int:
        """Measure the base model and load what a former process finished; returns the number of finished stages."""
        for strategy in self.plan.strategies:
            strategy.reset()  # of what it remembers of another run
        record, evaluator = self.record, self.evaluator
        tasks, states = record.read(self.model)
        fresh = not record.matrix
        row, general = (record.matrix or [[]])[0], (record.general or [{}])[0]
        if fresh or None in row or evaluator.lacks(general):
            place_model(self.model, self.args)
        record.measured(0, *evaluator.measure(self.model, 0, row, general), evaluator.answers)
        if tasks:
            mode = self.plan.method.mode
            adapters = tasks[-1:] if mode == "sequential" else tasks
            self.model = attach(self.model, self.output_dir, adapters, mode == "separate", self.plan.folds)
            for number, strategy in enumerate(self.plan.strategies if states else ()):
                strategy.load_state_dict(state_of(number, states))
        PartialState().wait_for_everyone()  # all have read what the main process is about to change
        if tasks:
            last = len(tasks)
            measured = evaluator.measure(self.model, 0, record.matrix[last], record.general[last])
            record.measured(last, *measured, evaluator.answers)
        if fresh:
            record.write()
        return len(tasks)

    def _train_task(self, index: int, train_sets: list[Any]) -> None:
        start = time.perf_counter()
        self.reporter.next_task(self.plan.stages()[index][0], sum(info["steps"] for info in self.record.trained))
        self.model, steps = train_task(self.plan, self.model, index, train_sets, self.record.checkpoints(index))
        row, general = self.evaluator.measure(self.model, index + 1)
        info = describe_task(
            self.plan, self.model, index, steps=steps, examples=row_count(train_sets[index]),
            truncated=self.truncated.get(self.plan.stages()[index][0], 0), seconds=time.perf_counter() - start,
        )  # fmt: skip
        self.record.finish(self.model, index, info, row, general, self.evaluator.answers)

    def evaluate(self) -> dict[str, float | None]:
        """{task: score in [0, 1]} of the model as it is on every task (None: it has no eval set).

        With method `perlora` each task is scored with its own adapter, one that has none yet with the base model.
        """
        if self.record.manifest is None and self.record.stack_tasks:
            raise RuntimeError(f"{self.output_dir} holds finished tasks: call train() first, it loads them")
        row, _ = self.evaluator.row(self.model)
        return dict(zip((task.name for task in self.plan.tasks), row, strict=True))

    def push_to_hub(self) -> dict[str, str]:
        """Push every finished task that the repository lacks; {tag: commit}. Raises what [`push_stack`] raises."""
        name = self.args.hub_model_id or self.output_dir.resolve().name
        return push_stack(self.output_dir, name, **push_options(self.args))

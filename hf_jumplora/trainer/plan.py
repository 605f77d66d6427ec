"""`RunPlan`: all that a run is told before its first step, and what follows from that alone."""

import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from types import CellType
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..data import Encoder, LanguageModelTask, Task, TextTask, collate, row_count
from ..data.encoder import drop_unlabelled_rows
from ..methods import Method, get_method
from ..strategies import Strategy
from ..tuner import JumpLoraConfig
from ..tuner.gguf import as_plain_floats
from .arguments import ContinualTrainingArguments, argument, default_arguments, result_arguments
from .backend import sharding
from .callbacks import early_stopping
from .task_trainer import ContinualTrainer


_SAMPLE = "Task 1:  the Größe of\n\tit's 2,345.67 €? don't-know\u00a0ﬁ 漢字 </s> <pad>"


@dataclass(frozen=True)
class RunPlan:
    """What is trained on what, how, and where to. Made by [`make_plan`], checked by [`checks.check`], never changed.

    model: the base model. tasks: trained on, in order. held_out: evaluated alone.
    config: of the adapters, the method's own prescriptions included.
    tokenizer: needed for text tasks. collator: None takes that of encoded text, or the trainer's own.
    trainer_cls, callbacks: of the trainer of each task.
    """

    model: Any
    tasks: list[Task]
    held_out: list[Task]
    method: Method
    args: TrainingArguments
    config: JumpLoraConfig
    strategies: list[Strategy]
    tokenizer: Any = None
    collator: Any = None
    trainer_cls: type = ContinualTrainer
    callbacks: list = field(default_factory=list)

    @property
    def output_dir(self) -> Path:
        """Where everything is written."""
        return Path(str(self.args.output_dir))

    @property
    def text_tasks(self) -> list[TextTask | LanguageModelTask]:
        """Those whose rows are texts, which the run encodes and scores itself."""
        return [task for task in (*self.tasks, *self.held_out) if isinstance(task, (TextTask, LanguageModelTask))]

    @property
    def additive(self) -> bool:
        """Whether the stack's model is the base and the sum of its tasks' updates."""
        return self.method.mode not in ("sequential", "separate")

    @property
    def folds(self) -> bool:
        """Whether earlier tasks are kept as their sum alone while a new one is trained."""
        return self.additive and not any("past_factors" in strategy.requires for strategy in self.strategies)

    @cached_property
    def encoder(self) -> Encoder:
        """From text to token ids, as long as `max_length` and the model's positions allow."""
        config = getattr(self.model, "config", None)
        positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
        length = min(argument(self.args, "max_length") or sys.maxsize, positions)
        return Encoder(self.tokenizer, length, bool(getattr(config, "is_encoder_decoder", False)))

    @cached_property
    def batches(self) -> Any:
        """The collator of the tasks' trainers; None: the Trainer's own."""
        if self.collator is None and any(not task.held_out for task in self.text_tasks):
            return collate(self.tokenizer)
        return self.collator

    def stages(self) -> list[tuple[str, int | None]]:
        """(name, training examples) of each stage: a task, or all tasks at once in joint training; None: streamed."""
        sizes = [(task.name, row_count(task.train_dataset)) for task in self.tasks]
        if self.method.mode != "joint":
            return sizes
        known = [size for _, size in sizes if size is not None]
        return [("joint", sum(known) if len(known) == len(sizes) else None)]

    def trainer_of(self, task: Task | None) -> tuple[Any, TrainingArguments]:
        """(trainer class, arguments) of a task, or of all tasks at once (None): the run's, unless it has its own."""
        return getattr(task, "trainer_cls", None) or self.trainer_cls, getattr(task, "args", None) or self.args

    @property
    def all_strategies(self) -> list[Strategy]:
        """The run's, then those of single tasks."""
        return [*self.strategies, *(strategy for task in self.tasks for strategy in task.strategies)]

    def strategies_of(self, task: Task | None) -> list[Strategy]:
        """Those that act while a task is trained: the run's, then its own."""
        return [*self.strategies, *(task.strategies if task else ())]

    def seed(self, index: int) -> int:
        """Of task number `index`: a restarted run draws the same numbers."""
        return self.args.seed + 1000 * index

    def describe(self) -> list[dict[str, Any]]:
        """For the report: of each task its sizes, what is measured, and the prompt with what it gives away."""
        return [task.describe() for task in (*self.tasks, *self.held_out)]

    def settings(self) -> dict[str, Any]:
        """The settings that identify a resumable run: what must be the same for a restarted one to continue."""
        skip = {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"}
        settings = {f"adapter.{key}": value for key, value in self.config.to_dict().items() if key not in skip}
        settings |= {f"args.{key}": value for key, value in result_arguments(self.args).items()}
        settings |= {"args.world_size": self.args.world_size, "args.sharding": sharding(self.args)}
        settings["method"] = self.method.name
        settings["strategies"] = [describe_strategy(strategy) for strategy in self.strategies]
        settings["trainer"] = getattr(self.trainer_cls, "func", self.trainer_cls).__name__
        if self.tokenizer is not None:
            settings["tokenizer"] = tokenizer_identity(self.tokenizer)
        if self.collator is not None:
            settings["collator"] = getattr(self.collator, "__qualname__", type(self.collator).__qualname__)
        if stopping := early_stopping(self.callbacks):
            settings["early_stopping"] = [
                [callback.early_stopping_patience, callback.early_stopping_threshold] for callback in stopping
            ]
        settings["base_model"] = getattr(self.model, "name_or_path", "")
        settings["base_dtype"] = str(getattr(self.model, "dtype", ""))
        quantization = getattr(getattr(self.model, "config", None), "quantization_config", None)
        if quantization is not None:
            settings["quantization"] = quantization if isinstance(quantization, dict) else quantization.to_dict()
        texts = [task.fingerprint() for task in self.held_out if isinstance(task, LanguageModelTask)]
        if texts and any(strategy.general is not None for strategy in self.strategies):
            settings["general"] = texts
        tasks = {f"task {n}": self._identity(task, task.fingerprint()) for n, task in enumerate(self.tasks)}
        given: dict[str, tuple] = {"": (self.collator, self.trainer_cls)}
        for n, task in enumerate(self.tasks):
            given[f" {n}"] = (task.compute_metrics, task.preprocess_logits_for_metrics, task.trainer_cls)
        functions: dict[str, Any] = {f"functions{key}": describe_functions(*some) for key, some in given.items()}
        functions |= {f"code{key}": describe_code(*some) for key, some in given.items()}
        return settings | tasks | {key: value for key, value in functions.items() if value}

    def former_settings(self) -> dict[str, Any]:
        """Settings as older runs have them: fingerprints of tasks as earlier versions computed them, and the defaults
        of training arguments, which are not stored."""
        defaults = {f"args.{key}": value for key, value in default_arguments(self.args).items()}
        tasks = {f"task {n}": self._identity(task, task.former_fingerprint()) for n, task in enumerate(self.tasks)}
        return defaults | tasks

    def _identity(self, task: Task, fingerprint: str) -> str:
        """Name and fingerprint of a task, and how it is trained where that is not as the run's other tasks are."""
        if task.trainer_cls is None and task.args is None and not task.strategies:
            return f"{task.name} {fingerprint}"
        cls, args = self.trainer_of(task)
        own = [fingerprint, getattr(cls, "func", cls).__name__, result_arguments(args)]
        own += [describe_strategy(strategy) for strategy in task.strategies]
        text = json.dumps(own, sort_keys=True, default=str)
        return f"{task.name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def general_texts(self) -> list[str]:
        """The training texts of the held-out plain texts: what a strategy with `general=True` keeps.

        Raises:
            ValueError: there are none.
        """
        plain = [task for task in self.held_out if isinstance(task, LanguageModelTask)]
        texts = [row[task.text_column] for task in plain for row in task.train_dataset or ()]
        if not texts:
            raise ValueError(
                "general=True keeps what the base model knows of general text, and no task has any to train on: give "
                "general_text, or a held-out LanguageModelTask with a train_dataset"
            )
        return texts


def make_plan(
    model: nn.Module,
    tasks: list[Task],
    method: str | Method = "jumplora",
    args: TrainingArguments | None = None,
    tokenizer: Any = None,
    *,
    trainer_cls: type = ContinualTrainer,
    adapter_config: JumpLoraConfig | None = None,
    strategies: list[Strategy] | list[str] | None = None,
    data_collator: Any = None,
    callbacks: list | None = None,
) -> RunPlan:
    """The plan of these arguments of [`ContinualRun`], not yet checked.

    Raises:
        ValueError: an unknown method, or something that is no task.
    """
    method, args = get_method(method), args or ContinualTrainingArguments()
    check_tasks(tasks)
    tasks = [_labelled(task, args) for task in tasks]
    return RunPlan(
        model=as_plain_floats(model),
        tasks=[task for task in tasks if not task.held_out],
        held_out=[task for task in tasks if task.held_out],
        method=method,
        args=args,
        config=method.adapter_config(adapter_config),
        strategies=method.make_strategies(strategies),
        tokenizer=tokenizer,
        collator=data_collator,
        trainer_cls=trainer_cls,
        callbacks=list(callbacks or ()),
    )


def check_tasks(tasks: list[Any]) -> None:
    """Raise ValueError unless these are tasks, not their names."""
    for task in tasks:
        if not isinstance(task, Task):
            raise ValueError(
                f"tasks takes Task, TextTask or LanguageModelTask objects, got {task!r}; load_tasks(stream) makes them "
                "from a stream file"
            )


def _labelled(task: Task, args: TrainingArguments) -> Task:
    """A task without the eval rows that have no label, where its loss is looked at: they would make it NaN."""
    best = (task.args or args).metric_for_best_model or ""
    if task.compute_metrics is not None and "loss" not in (task.metric, best.removeprefix("eval_")):
        return task
    rows = drop_unlabelled_rows(task.eval_dataset, task.name, "eval")
    return task if rows is task.eval_dataset else replace(task, eval_dataset=rows)


def describe_strategy(strategy: Strategy) -> str:
    """A strategy with all its options, by which a restarted run knows it."""
    seed = f" seed={strategy.seed}" if strategy.seed and " seed=" not in repr(strategy).replace("(", " ") else ""
    return f"{strategy!r}{seed}"


def describe_functions(*given: Any) -> list[str]:
    """Names of functions and of objects that are called (not of classes), with a hash of a partial's arguments or of a
    dataclass's fields, of which only what JSON has counts: it tells another setting, not another body."""
    found = []
    for value in given:
        if value is None or isinstance(value, type):
            continue
        options: dict[Any, Any] = {}
        if isinstance(value, functools.partial):
            options, value = {**dict(enumerate(value.args)), **value.keywords}, value.func
        elif is_dataclass(value):
            options = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        text = json.dumps([[str(key), option] for key, option in options.items()], default=_name)
        digest = f" {hashlib.sha256(text.encode()).hexdigest()[:16]}" if options else ""
        found.append(f"{_name(value)}{digest}")
    return found


def describe_code(*given: Any) -> str | None:
    """Python's version, and a hash of the bytecode, constants, defaults and closures of functions, those among a
    partial's arguments too. Not seen: what they call, and code of classes and of installed packages."""
    found: list[Any] = []
    for function in _functions(given):
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *_closure(function)]
        plain = [repr(value) for value in held if isinstance(value, (int, float, str, type(None)))]
        found.append([plain, _code(function.__code__)])
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{version} {hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]}" if found else None


def _functions(value: Any) -> Iterator[Any]:
    if isinstance(value, functools.partial):
        yield from _functions((value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _functions(part)
    elif (code := getattr(value, "__code__", None)) is not None and "-packages" not in code.co_filename:
        yield value
        yield from (inner for inner in _closure(value) if hasattr(inner, "__code__"))  # that of a decorator


def _closure(function: Any) -> list[Any]:
    """What the cells of a function hold; one that is not filled yet holds nothing."""
    return [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]


def _code(code: Any) -> list[Any]:
    """Of a code object what JSON has, the same in every process: the order of a set constant is not."""

    def constant(value: Any) -> Any:
        if hasattr(value, "co_code"):
            return _code(value)
        return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)

    return [code.co_code.hex(), code.co_names, [constant(value) for value in code.co_consts]]


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__qualname__)


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of what a tokenizer (a processor's too; of another processor, its settings) makes of texts: its tokens and
    special tokens, its chat template, and the ids of a sample. Other versions of its files give the same."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not hasattr(tokenizer, "get_vocab"):
        known = [type(tokenizer).__name__, tokenizer.to_json_string() if hasattr(tokenizer, "to_json_string") else ""]
    else:
        special = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")]
        template = str(getattr(tokenizer, "chat_template", None))
        known = [sorted(tokenizer.get_vocab().items()), special, template, tokenizer(_SAMPLE).input_ids]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

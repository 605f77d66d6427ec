"""Checks of a plan before the first step: what cannot work is an error that names the option and what to do."""

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, Trainer
from transformers.trainer_utils import HubStrategy, IntervalStrategy

from ..data import LanguageModelTask, Task, TextTask, row_count
from ..data.ranges import check_ranges
from ..stack.source import check_in_memory
from ..strategies import Strategy
from ..tuner import JumpLoraConfig, is_causal, named_layers, ramp_steps
from .arguments import argument
from .backend import sharding
from .callbacks import early_stopping
from .plan import RunPlan
from .preferences import PREFERENCE_ACCURACY, check_preferences
from .task_trainer import ContinualMixin


_NOT_WITH_DEEPSPEED = {
    "optimizer": "the run makes the optimizer, with the thresholds' own groups: leave it out",
    "scheduler": "its steps are those of one task: leave it out and set lr_scheduler_type",
    "tensor_parallel": "adapters need whole layers: leave it out",
}
_NOT_WITH_ZERO = {
    "zero_hpz_partition_size": (1, "merged tasks would be missing in the second copy of the weights: leave it out"),
    "zero_quantized_weights": (False, "merged tasks would be quantised away: leave it out"),
    "zero_quantized_nontrainable_weights": (False, "merged tasks would be quantised away: leave it out"),
}


_NOT_IN_A_RUN = {
    "auto_find_batch_size": "a task would go on half trained, with another batch than the run's settings say: leave it "
    "out and give per_device_train_batch_size and gradient_accumulation_steps",
    "load_best_model_at_end": "it would undo the end of the gate's ramp; leave it out",
    "save_only_model": "such a checkpoint has no optimizer and no random state, so an interrupted task could not "
    "continue exactly: leave it out",
    "ignore_data_skip": "an interrupted task would see the same rows twice: leave it out",
    "resume_from_checkpoint": "a run finds the checkpoint in output_dir by itself: leave it out",
}


def check(plan: RunPlan) -> None:
    """Everything that can be checked before the first step; writes nothing and needs no network.

    Raises:
        ValueError: something cannot work; the message names the option, task or file and says what to do.
    """
    if not isinstance(plan.model, nn.Module):
        raise ValueError(
            f"model must be a loaded model (AutoModelForCausalLM.from_pretrained(...)), got {plan.model!r}"
        )
    if isinstance(plan.model, PeftModel):
        raise ValueError("ContinualRun takes the base model and adds the adapters itself; this is a PeftModel")
    if any(isinstance(module, BaseTunerLayer) for module in plan.model.modules()):
        raise ValueError(
            "this model still contains the adapters of an earlier training, which changed it in place: load the base "
            "model again"
        )
    _check_tasks(plan)
    _check_adapters(plan)
    if plan.args.push_to_hub and (when := HubStrategy(plan.args.hub_strategy).value) not in ("every_save", "end"):
        raise ValueError(
            f"hub_strategy={when!r} pushes checkpoints; a run pushes finished tasks: use "
            "'every_save' (after each task) or 'end'"
        )
    check_backend(plan)
    check_in_memory(plan.model)
    _check_statistics(plan.model)
    # The adapter is added and removed again: targets, ranks and layer types that cannot work show now.
    filled = copy.deepcopy(plan.config)
    adapted = get_peft_model(plan.model, filled)
    layers = [name for name, _ in named_layers(adapted)]
    adapted.unload()
    _check_names(filled, layers)
    if filled.modules_to_save:  # by PEFT itself
        raise ValueError(
            f"task_type={filled.task_type!r} makes PEFT train {', '.join(filled.modules_to_save)} in full, which would "
            "be replaced from task to task: leave task_type out"
        )
    if not any(isinstance(task, LanguageModelTask) for task in plan.tasks):  # their steps are known once they are cut
        check_steps(plan, [size for _, size in plan.stages()])


def _check_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats and module.momentum != 0:
            raise ValueError(
                f"{name} of the base is a {type(module).__name__}, whose running statistics change while adapters are "
                "trained, and no adapter holds them: set its momentum to 0.0, or freeze it in the model's class"
            )


def _check_names(config: JumpLoraConfig, layers: list[str]) -> None:
    """Raise ValueError if a pattern of the config is that of no adapted layer; a warning if a target is."""
    for option in ("rank_pattern", "alpha_pattern", "density_pattern"):
        for key in getattr(config, option):
            if all(get_pattern_key([key], name) != key for name in layers):
                raise ValueError(
                    f"{option}: {key!r} is the name of no adapted layer; these are {', '.join(layers[:4])}, ..."
                )
    targets = config.target_modules
    for key in targets if isinstance(targets, (list, set, tuple)) else ():
        if not any(f".{name}".endswith(f".{key}") for name in layers):
            warnings.warn(f"target_modules: {key!r} is the name of no layer that could be adapted", stacklevel=2)


def _check_tasks(plan: RunPlan) -> None:
    if not plan.tasks:
        raise ValueError("a run needs at least one task")
    names = [task.name for task in (*plan.tasks, *plan.held_out)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two tasks are called {sorted(twice)[0]!r}; give each its own name")
    if plan.text_tasks and plan.tokenizer is None:
        raise ValueError("text tasks need processing_class (the tokenizer)")
    if plan.text_tasks and plan.tokenizer.eos_token_id is None:
        raise ValueError("text tasks need a tokenizer with an end-of-sequence token (eos_token): it ends the answers")
    generates = argument(plan.args, "eval_mode") == "generate"
    for text in plan.text_tasks:
        if isinstance(text, TextTask) and text.labels:
            plan.encoder.check_labels(text, generates and bool(text.eval_dataset))
    plain = [task.name for task in plan.text_tasks if isinstance(task, LanguageModelTask)]
    if plain and not is_causal(plan.model):
        raise ValueError(
            f"LanguageModelTask needs a causal LM, got {type(plan.model).__name__}; remove task {plain[0]!r}"
        )
    if type(collator := plan.collator) is DataCollatorForLanguageModeling and (
        not collator.mlm and collator.tokenizer.pad_token_id == collator.tokenizer.eos_token_id
    ):
        warnings.warn(
            "data_collator: transformers' DataCollatorForLanguageModeling gives pad tokens no label, and here the end "
            "of sequence is one: no model will learn to end. Give the tokenizer another pad_token",
            stacklevel=2,
        )
    for task in (*plan.tasks, *plan.held_out):
        _check_trainer(plan, task)
        if task not in plan.text_tasks and _as_they_are(plan, task):
            check_ranges(task, plan.model)


def _as_they_are(plan: RunPlan, task: Task) -> bool:
    """Whether the labels of a plain task reach the model as they stand in its rows."""
    cls, collator = plan.trainer_of(task)[0], plan.collator
    own = [c for c in getattr(cls, "__mro__", ()) if "compute_loss" in vars(c)] == [ContinualMixin, Trainer]
    return (
        own
        and isinstance(plan.model, PreTrainedModel)
        and (collator is None or type(collator).__module__.startswith("transformers."))
    )


def _check_trainer(plan: RunPlan, task: Task) -> None:
    """The trainer class and arguments of one task."""
    where, (cls, args) = f"task {task.name!r}", plan.trainer_of(task)
    own = [name for name in ("trainer_cls", "args") if getattr(task, name) is not None]
    if own and (plan.method.mode == "joint" or task in plan.text_tasks):
        what = "all tasks are trained at once" if plan.method.mode == "joint" else "a run encodes text tasks itself"
        raise ValueError(f"{where} has {own[0]} of its own, and {what}: leave it out")
    if own and (kind := sharding(args)) != sharding(plan.args):
        raise ValueError(f"{where}: args say {kind}, those of the run {sharding(plan.args)}; they must agree")
    _check_own_strategies(plan, task)
    for option, why in _NOT_IN_A_RUN.items():
        if getattr(args, option):
            raise ValueError(f"{option}: {why}")
    if args.eval_on_start and IntervalStrategy(args.eval_strategy) == IntervalStrategy.NO:
        raise ValueError("eval_on_start needs eval_strategy; a run measures the base before the first task by itself")
    if args.label_smoothing_factor and getattr(plan.model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{where}: label_smoothing_factor takes the labels out of the inputs, from which an encoder-decoder makes "
            "its decoder's: leave it out"
        )
    if None in (row_count(task.train_dataset), row_count(task.eval_dataset)):
        if args.max_steps <= 0:
            raise ValueError(f"{where} has a streamed data set, whose length is not known: give max_steps")
        for strategy in plan.strategies_of(task):
            if "training_data" in strategy.hooks:
                raise ValueError(f"{where} has a streamed data set, with which {strategy!r} cannot mix rows")
    if not task.held_out:
        _check_evaluation(plan, task)
    if task.eval_dataset is None:
        return
    if task.metric == PREFERENCE_ACCURACY:
        check_preferences(task.name, task.eval_dataset, plan.tokenizer)
    elif any(base.__name__ == "DPOTrainer" for base in getattr(cls, "func", cls).__mro__):
        raise ValueError(
            f"{where}: TRL's DPOTrainer cannot evaluate finished tasks (it expects an adapter 'default'): give "
            f'metric="{PREFERENCE_ACCURACY}", or leave eval_dataset out'
        )


def _check_own_strategies(plan: RunPlan, task: Task) -> None:
    if not isinstance(task.strategies, (list, tuple)) or (task.strategies and plan.method.mode == "joint"):
        raise ValueError(
            f"task {task.name!r}: strategies is a list of Strategy objects, for a task that is trained by itself (not "
            f"in joint training, and the method is {plan.method.name!r}), got {task.strategies!r}"
        )
    for strategy in task.strategies:
        remembers = getattr(type(strategy), "state_dict", None) is not Strategy.state_dict
        if isinstance(strategy, Strategy) and (remembers or "past_factors" in strategy.requires):
            raise ValueError(
                f"task {task.name!r}: {strategy!r} remembers a task for later ones: give it to the run (strategies=...)"
            )


def _check_adapters(plan: RunPlan) -> None:
    """The adapters' config, and whether the strategies go with it and with each other."""
    config = plan.config
    for option in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, option):
            raise ValueError(
                f"{option} trains whole weights that replace each other from task to task, so they cannot be part "
                "of an additive stack; adapt these layers through target_modules, or freeze them"
            )
    if config.parent_adapters or config.support:
        raise ValueError("parent_adapters and support are set by the run itself; leave them out of adapter_config")
    for strategy in plan.all_strategies:
        if not isinstance(strategy, Strategy):
            raise ValueError(f"strategies takes Strategy objects such as KFac(weight=10.0), got {strategy!r}")
        _check_identity(strategy)
        strategy.check(plan.method.mode, config)
    for task in (*plan.tasks, None):  # None: the run's own arguments
        acting = plan.strategies_of(task)
        for strategy in acting:
            others = [other for other in acting if other is not strategy]
            strategy.check_run(others, plan.trainer_of(task)[1], sharding(plan.args))
    for strategy in plan.all_strategies:
        if "softmax" in strategy.requires and (other := _no_softmax(plan)):
            raise ValueError(
                f"{strategy!r} takes the model's logits for those of a softmax over answers, and {other}: use a method "
                "without it, such as inclora, jumplora or ella"
            )
    share = config.target_density if config.isolation == "hard" else None
    if share is not None and share * len(plan.tasks) > 1:
        raise ValueError(
            f"isolation='hard' gives each entry to one task, and {len(plan.tasks)} tasks that keep {share:.0%} each "
            f"need more entries than there are: target_density must be below {1 / len(plan.tasks):.3f}"
        )


def _no_softmax(plan: RunPlan) -> str | None:
    """What a model's answers are, in words, where they are not the classes of a softmax."""
    name, config = type(plan.model).__name__, getattr(plan.model, "config", None)
    if name.endswith("ForQuestionAnswering"):
        return f"{name} answers with places in a text"
    if (kind := getattr(config, "problem_type", None)) in ("regression", "multi_label_classification"):
        return f"the model's problem_type is {kind!r}"
    if not name.endswith(("ForSequenceClassification", "ForTokenClassification")):
        return None
    if getattr(config, "num_labels", 2) == 1:
        return f"{name} with num_labels=1 answers with a number"
    for task in plan.tasks:
        row = task.train_dataset[0] if isinstance(task.train_dataset, Dataset) else {}
        label = row.get("labels", row.get("label"))
        if isinstance(label[0] if isinstance(label, list) and label else label, float):
            return f"a label of task {task.name!r} is {label!r}, no class"
    return None


def _check_identity(strategy: Strategy) -> None:
    """Raise ValueError unless the repr of a strategy names all its options: a restarted run knows it by that."""
    known = {f.name for f in dataclasses.fields(strategy)} if dataclasses.is_dataclass(strategy) else set()
    known |= {"seed", "step", "steps", "general", "reused"}  # a run sets them
    hidden = [k for k, value in vars(strategy).items() if k not in known and not (k[0] == "_" or callable(value))]
    own = "__repr__" in vars(type(strategy)) and not dataclasses.is_dataclass(strategy)
    if (hidden and not own) or re.search(r" at 0x[0-9a-f]+", repr(strategy)):
        raise ValueError(
            f"strategy {type(strategy).__name__}: its repr, {repr(strategy)[:100]}, by which a restarted run knows it, "
            f"does not say what {hidden[0] if hidden else 'an option'} is: make the class a dataclass, with options as "
            "fields and what it learns as fields with init=False, repr=False"
        )


def _check_evaluation(plan: RunPlan, task: Task) -> None:
    """Whether a task can be evaluated between its steps, and ended early, where that is asked for."""
    args, stopping = plan.trainer_of(task)[1], early_stopping(plan.callbacks)
    evaluates = IntervalStrategy(args.eval_strategy) != IntervalStrategy.NO
    if evaluates and plan.method.mode == "joint":
        raise ValueError(f"eval_strategy: method {plan.method.name!r} trains on all tasks at once: leave it out")
    if evaluates and task.eval_dataset is None and row_count(task.train_dataset) != 0:
        raise ValueError(f"eval_strategy evaluates each task between its steps, and {task.name!r} has no eval_dataset")
    if not stopping:
        return
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if not evaluates or not metric:
        raise ValueError("EarlyStoppingCallback needs eval_strategy and metric_for_best_model ('loss' of text tasks)")
    if task in plan.text_tasks and metric != "loss":
        raise ValueError(f"metric_for_best_model={metric!r}: between the steps of a text task its 'loss' is measured")
    for strategy in plan.strategies_of(task):
        if "all_steps" in strategy.requires:
            raise ValueError(f"EarlyStoppingCallback: {strategy!r} needs all steps of a task: leave one of them out")


def check_backend(plan: RunPlan) -> None:
    """Raises ValueError, naming the option and what to do, for what cannot work with DeepSpeed or FSDP."""
    args, kind = plan.args, sharding(plan.args)
    if kind in ("none", "ddp"):
        return
    if kind == "zero0":
        raise ValueError("DeepSpeed with ZeRO stage 0 is DDP: use recipes/accelerate/ddp.yaml, or stage 1, 2 or 3")
    if args.fp16:
        raise ValueError(f"fp16=True scales losses, and is not tested with {kind}: use bf16=True")
    for task in (*plan.tasks, *plan.held_out):
        by_run = task in plan.text_tasks or task.metric == PREFERENCE_ACCURACY
        if task.eval_dataset is not None and not by_run:
            raise ValueError(
                f"task {task.name!r} is evaluated by the Trainer itself, which is not supported with {kind}: make it a "
                "TextTask, leave its eval_dataset out, or train with DDP"
            )
    if kind in ("zero3", "fsdp2"):
        for strategy in plan.all_strategies:
            if "whole_model" in strategy.requires:
                raise ValueError(
                    f"strategy {strategy!r} needs the whole model in each process, which {kind} shards: use "
                    "zero1, zero2 or DDP"
                )
        if getattr(plan.model, "is_quantized", False):
            raise ValueError(f"a quantised base cannot be sharded by {kind}: use DDP, zero1 or zero2")
    if kind.startswith("zero"):
        _check_deepspeed(plan, kind)


def _check_deepspeed(plan: RunPlan, kind: str) -> None:
    dtype = getattr(plan.model, "dtype", None)
    if plan.args.bf16 and dtype != torch.bfloat16:
        raise ValueError(
            f"bf16=True with {kind} trains float32 factors over a base in bf16, and this one is "
            f"{dtype}: load it with dtype=bfloat16 (--dtype bfloat16)"
        )
    config = plan.args.deepspeed_plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    found = [(key, why) for key, why in _NOT_WITH_DEEPSPEED.items() if config.get(key)]
    for key, (default, why) in _NOT_WITH_ZERO.items():
        if zero.get(key, default) != default:
            found.append((f"zero_optimization.{key}", why))
    if zero.get("offload_param", {}).get("device") == "nvme":
        found.append(("zero_optimization.offload_param.device=nvme", "merging reads weights in memory: use cpu"))
    if found:
        raise ValueError(f"the DeepSpeed config has {found[0][0]!r}: {found[0][1]}")


def check_steps(plan: RunPlan, sizes: Sequence[int | None]) -> None:
    """Raise ValueError that names the stage whose `sizes` examples make no step, or too few for the gate's ramp."""
    tasks = plan.tasks if plan.method.mode != "joint" else [None]
    for task, (name, _), examples in zip(tasks, plan.stages(), sizes, strict=True):
        if examples == 0:  # a past task whose data is not available
            continue
        args = plan.trainer_of(task)[1]
        steps, batch = planned_steps(args, examples), args.train_batch_size * args.world_size
        if steps <= 0 or (args.dataloader_drop_last and examples is not None and examples < batch):
            raise ValueError(
                f"task {name!r}: num_train_epochs={args.num_train_epochs} of {examples} rows in batches of {batch} "
                "make no step: give it more epochs or rows, or leave dataloader_drop_last out"
            )
        try:
            if plan.config.gate:
                ramp_steps(steps, plan.config)
            for strategy in plan.strategies_of(task):
                strategy.check_steps(steps)
        except ValueError as error:
            raise ValueError(f"task {name!r}: {error}") from error


def planned_steps(args: Any, examples: int | None) -> int:
    """Optimizer steps of a task, as the Trainer counts them; examples: None for a streamed data set."""
    if args.max_steps > 0 or examples is None:
        return args.max_steps
    batches = examples / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)

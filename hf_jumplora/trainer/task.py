"""One task: its adapter on top of the finished ones, its trainer, its training, and what its task.json says."""

import copy
import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import PrinterCallback, Trainer, set_seed
from transformers.trainer_utils import IntervalStrategy

from .. import metrics as formulas
from ..data import Task, TextTask, row_count
from ..data.encoder import drop_unlabelled_rows, masked_rows
from ..ops.sparse import decode_support
from ..report.folder import HISTORY
from ..stack.load import merge_finished
from ..stack.weights import as_bytes, digest
from ..tuner import JumpLoraConfig, density, fold_finished, named_layers
from .backend import fresh_accelerator, release, sharding
from .callbacks import EndUnsaved, HistoryCallback, LogLines, early_stopping, ended_early
from .checkpoints import newest_checkpoint
from .plan import RunPlan
from .processes import quiet


def train_task(plan: RunPlan, model: Any, index: int, train_sets: list[Any], checkpoints: Path) -> tuple[Any, int]:
    """Train task number `index` of a plan, or what is left of it after a restart.

    model: holds the tasks before. train_sets: of the tasks, None where the data of a past one is not available.

    Returns:
        (a PeftModel in which the task is finished as adapter `task_00k`, and merged; its optimizer steps).
    """
    set_seed(plan.seed(index))
    model = new_adapter(model, copy.deepcopy(plan.config), index, plan.method.mode, plan.folds)
    mixed = train_sets[index]
    task = plan.tasks[index] if plan.method.mode != "joint" else None
    for strategy in plan.strategies_of(task):
        mixed = strategy.training_data(mixed, index, train_sets[:index])
    before = set(model.peft_config)
    options = {"train_dataset": mixed, **_evaluation(plan, task)}
    trainer: Any = task_trainer(plan, model, checkpoints, index, task, **options)
    trainer.own_rows = own = row_count(train_sets[index]) or 0
    stages = plan.stages()
    if (rows := trainer.train_dataset) is not mixed:  # TRL's trainers encode it, and may pack it
        own = own if own != row_count(mixed) else row_count(rows) or 0
        trainer.own_rows = own - sum(i < own for i in masked_rows(rows))
        trainer.train_dataset = drop_unlabelled_rows(rows, stages[index][0])
    trainer.add_callback(HistoryCallback(plan.output_dir / HISTORY, stages[index][0]))
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLines(stages[index][0], index + 1, len(stages)))
    last, base = newest_checkpoint(checkpoints), _frozen(model, plan.args, stages[index][0])
    output = trainer.train(resume_from_checkpoint=str(last) if last else None)
    _check_ended(trainer, stages[index][0], checkpoints)
    release(trainer)
    for extra in set(model.peft_config) - before:  # TRL's DPO keeps its reference as an adapter
        model.delete_adapter(extra)
    name = f"task_{index:03d}"
    trainer.finish(name)
    _check_unchanged(base, _frozen(model, plan.args, stages[index][0], base), stages[index][0])
    if plan.method.mode != "separate":
        merge_finished(model, [name])
    return model, output.global_step


def _evaluation(plan: RunPlan, task: Task | None) -> dict[str, Any]:
    """What a task's trainer needs to evaluate it between its steps (`eval_strategy`): the task's own eval set."""
    if task is None or IntervalStrategy(plan.trainer_of(task)[1].eval_strategy) == IntervalStrategy.NO:
        return {}
    if task in plan.text_tasks:
        return {"eval_dataset": plan.encoder.train_rows(dataclasses.replace(task, train_dataset=task.eval_dataset))}
    return {"eval_dataset": task.eval_dataset, **task.scoring()}


def _frozen(model: nn.Module, args: Any, name: str, before: dict[str, Any] | None = None) -> dict[str, str | int]:
    """A fingerprint of each weight and saved buffer of the base, which training an adapter must not change: a digest on
    a CPU; on a GPU the sum of its bytes, so that nothing is copied. `before` says which of the two to take, should the
    weights have moved. {} where each process has a piece.

    Raises:
        RuntimeError: one of them would be trained.
    """
    base = [(key, weight) for key, weight in model.named_parameters() if "jumplora_" not in key]
    if trained := [key for key, weight in base if weight.requires_grad]:
        raise RuntimeError(
            f"task {name!r}: {trained[0]} of the base would be trained (requires_grad), and a stack keeps adapters "
            "alone: a callback or the trainer class must leave the base frozen"
        )
    if sharding(args) in ("zero3", "fsdp2"):
        return {}
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if "jumplora_" not in key}
    values = {k: v.data for k, v in state.items() if torch.is_tensor(v) and v.is_floating_point() and not v.is_meta}
    by_sum = {key: v.device.type != "cpu" for key, v in values.items()}
    by_sum |= {key: isinstance(value, int) for key, value in (before or {}).items()}
    return {key: int(as_bytes(v).sum()) if by_sum[key] else digest(v) for key, v in values.items()}


def _check_unchanged(before: dict[str, Any], now: dict[str, Any], name: str) -> None:
    if changed := [key for key, value in now.items() if before.get(key, value) != value]:
        raise RuntimeError(
            f"{changed[0]} of the base changed while task {name!r} was trained ({len(changed)} weights in all), and a "
            "stack keeps adapters alone: the task is not finished. A callback, the trainer class or the model itself "
            "has written into it"
        )


def _check_ended(trainer: Any, name: str, checkpoints: Path) -> None:
    """Raise RuntimeError unless a task was trained to its last step, or until early stopping ended it."""
    state = trainer.state
    if state.global_step >= state.max_steps or ended_early(early_stopping(trainer.callback_handler.callbacks)):
        return
    last = newest_checkpoint(checkpoints)
    kept = f"continues it from {last}" if last else "trains it again from its start, since no checkpoint was saved"
    raise RuntimeError(
        f"task {name!r} was stopped at step {state.global_step} of {state.max_steps} (a callback set "
        f"should_training_stop): it is not finished. The same command {kept}. To end tasks early, use an "
        "EarlyStoppingCallback"
    )


def new_adapter(model: Any, config: JumpLoraConfig, index: int, mode: str, fold: bool) -> Any:
    """Put the adapter `default` of task number `index` into a model that holds the tasks before; returns a PeftModel.

    mode: of the method. fold: keep the finished tasks as their sum alone (see [`fold_finished`]).
    """
    finished = [f"task_{k:03d}" for k in range(index)]
    if index == 0:
        return get_peft_model(model, config)
    model.unmerge_adapter()
    if mode not in ("sequential", "separate"):
        config.parent_adapters = finished
    model.add_adapter("default", config)
    model.set_adapter("default")
    if mode == "sequential":
        with torch.no_grad():
            for _, layer in named_layers(model):
                layer.jumplora_A["default"].copy_(layer.jumplora_A[finished[-1]])
                layer.jumplora_B["default"].copy_(layer.jumplora_B[finished[-1]])
        model.delete_adapter(finished[-1])
    elif mode != "separate":
        if fold:
            fold_finished(model, finished[-1:])
        merge_finished(model, finished)
    return model


def task_trainer(
    plan: RunPlan,
    model: Any,
    output_dir: Path,
    index: int,
    task: Task | None = None,
    **options: Any,
) -> Trainer:
    """The trainer of task number `index` with the task's arguments or the plan's; `options` are others of its class.

    Raises:
        TypeError: the `trainer_cls` cannot be made from its arguments.
    """
    trainer_cls, args = plan.trainer_of(task)
    args = copy.copy(args)
    args.output_dir, args.seed = str(output_dir), plan.seed(index)
    args.push_to_hub, args.hub_token = False, None  # the run pushes, not the trainer of a task
    args.report_to, args.disable_tqdm = [], quiet(args)  # the run reports (`ReportCallback`)
    # The patience of early stopping is a task's own, and goes on where a checkpoint was written.
    callbacks = [copy.copy(callback) if early_stopping([callback]) else callback for callback in plan.callbacks]
    if stopping := early_stopping(callbacks):
        for callback in stopping:
            callback.early_stopping_patience_counter = 0
        args.restore_callback_states_from_checkpoint = True
        callbacks.append(EndUnsaved(stopping))
    args.enable_jit_checkpoint = False  # the run's own callback (`Sigterm`) does that
    if args.deepspeed_plugin is not None:
        args.bf16, args.mixed_precision = False, "no"  # see `shard_base`
        fresh_accelerator()
    if trainer_cls is plan.trainer_cls:  # another class has a collator of its own
        options["data_collator"] = plan.batches
    try:
        return trainer_cls(
            model=model, args=args, processing_class=plan.tokenizer, strategies=plan.strategies_of(task),
            callbacks=callbacks, **options,
        )  # fmt: skip
    except (TypeError, AttributeError) as error:  # SFTTrainer itself, or ContinualSFTTrainer without an SFTConfig
        name = getattr(trainer_cls, "func", trainer_cls).__name__
        raise TypeError(
            f"{name} cannot be made from {type(args).__name__} ({error}): trainer_cls must come from make_continual, "
            "and args must be of the class it takes (TRL's SFTTrainer: SFTConfig)"
        ) from error


def describe_task(
    plan: RunPlan, model: Any, index: int, *, steps: int, examples: int | None, truncated: int, seconds: float
) -> dict[str, Any]:
    """What task.json says of a finished task that `model` holds as `task_00k`; with a gate also how its support meets
    those of the earlier tasks (in the main process).

    examples: its training rows (None, streamed: those that its steps took). truncated: how many of its texts were cut.
    seconds: of training and evaluation.
    """
    task = plan.tasks[index] if plan.method.mode != "joint" else None
    name, (_, args) = plan.stages()[index][0], plan.trainer_of(task)
    reused = [plan.stages()[s.reused][0] for s in plan.strategies if s.reused is not None]
    text = task if isinstance(task, TextTask) else None
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return {
        "name": name,
        "index": index,
        "density": 0.0 if reused else density(model, f"task_{index:03d}"),
        "steps": steps,
        "train_examples": steps * batch if examples is None else examples,
        "truncated": truncated if text else None,
        "source": task.source if task else "",
        "labels": text.labels if text else None,
        "instruction": text.instruction if text else None,
        "seed": plan.seed(index),
        "effective_batch": batch,
        "processes": args.world_size,
        "sharding": sharding(args),
        "seconds": round(seconds, 1),
        **({"reused": reused[0]} if reused else {}),
        **(_overlaps(model, plan.output_dir, index) if plan.config.gate and args.process_index == 0 else {}),
    }


def _overlaps(model: Any, stack: Path, index: int) -> dict[str, Any]:
    """Collision rate and overlap of the support of finished task number `index` with each earlier one's; `layers`:
    {layer: its density and its collision rates}.

    The supports of the earlier tasks are read from the stack, one layer of one task at a time.
    """
    name = f"task_{index:03d}"
    shared, sizes, mine, entries = [0] * index, [0] * index, 0, 0
    layers: dict[str, dict[str, Any]] = {}
    with ExitStack() as opened:
        paths = [stack / f"task_{k:03d}" / "adapter_model.safetensors" for k in range(index)]
        files = [opened.enter_context(safe_open(path, framework="pt")) for path in paths]
        for layer_name, layer in named_layers(model, name):
            support, both = layer.support(name).cpu(), []
            kept, size = int(support.sum()), support.numel()
            mine, entries = mine + kept, entries + size
            for k, file in enumerate(files):
                code = file.get_tensor(f"base_model.model.{layer_name}.jumplora_support")
                other = decode_support(code, (layer.out_features, layer.in_features))
                sizes[k] += int(other.sum())
                both.append(int((other & support).sum()))
                shared[k] += both[k]
            collision = [round(formulas.collision_rate(n, size), 6) for n in both]
            layers[layer_name] = {"density": round(kept / size, 6), "collision": collision}
    return {
        "layers": layers,
        "collision": [formulas.collision_rate(shared[k], entries) for k in range(index)],
        "overlap": [formulas.overlap(shared[k], sizes[k], mine) for k in range(index)],
    }

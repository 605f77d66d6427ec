"""What a run checks before its first step, and the settings by which a restarted run knows itself."""

import copy
import math
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model

from ..tuner import ramp_steps


if TYPE_CHECKING:
    from .run import ContinualRun


_RESULT_SETTINGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "lr_scheduler_kwargs", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "seed", "data_seed", "bf16", "fp16",
    "dataloader_drop_last", "train_sampling_strategy", "world_size", "gate_learning_rate", "factor_optimizer",
    "loraplus_lr_ratio", "riemannian_reg", "max_length", "eval_mode",
    "eval_tasks",
)  # fmt: skip


def check_run(run: "ContinualRun") -> None:
    """Everything that can be checked before the first step. Raises ValueError that names the option, task or file."""
    if not run.tasks:
        raise ValueError("a run needs at least one task")
    names = [task.name for task in run.tasks]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two tasks are called {sorted(twice)[0]!r}; give each its own name")
    if isinstance(run.model, PeftModel):
        raise ValueError("ContinualRun takes the base model and makes the adapters itself; this is a PeftModel")
    for option in ("modules_to_save", "trainable_token_indices"):
        if getattr(run.config, option):
            raise ValueError(
                f"{option} trains whole weights that replace each other from task to task, so they cannot be part "
                "of an additive stack; adapt these layers through target_modules, or freeze them"
            )
    if run.config.parent_adapters or run.config.support:
        raise ValueError("parent_adapters and support are set by the run itself; leave them out of adapter_config")
    for strategy in run.strategies:
        strategy.check(run.method.mode, run.config)
    if run.args.push_to_hub:
        raise ValueError("push_to_hub is not supported by ContinualRun yet; upload output_dir when it has finished")
    if run.args.load_best_model_at_end:
        raise ValueError("load_best_model_at_end would undo the end of the gate's ramp; leave it out")
    if run._text_tasks() and run.processing_class is None:
        raise ValueError("text tasks need processing_class (the tokenizer)")
    if run._text_tasks() and run.processing_class.eos_token_id is None:
        raise ValueError("text tasks need a tokenizer with an end-of-sequence token (eos_token): it ends the answers")
    # The adapter is put in and taken out again: targets, ranks and layer types that cannot work show now.
    get_peft_model(run.model, copy.deepcopy(run.config)).unload()
    if run.config.gate:
        for stage in stage_sizes(run):
            try:
                ramp_steps(planned_steps(run.args, stage[1]), run.config)
            except ValueError as error:
                raise ValueError(f"task {stage[0]!r}: {error}") from error


def stage_sizes(run: "ContinualRun") -> list[tuple[str, int]]:
    """(name, training examples) of each stage: a task, or all tasks at once in joint training."""
    sizes = [(task.name, len(task.train_dataset)) for task in run.tasks]
    return sizes if run.method.mode != "joint" else [("joint", sum(size for _, size in sizes))]


def planned_steps(args, examples: int) -> int:
    """Optimizer steps of a task, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = examples / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)


def run_settings(run: "ContinualRun") -> dict[str, Any]:
    """What must be the same for a restarted run to continue."""
    config = run.config.to_dict()
    skip = {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"}
    settings = {f"adapter.{key}": value for key, value in config.items() if key not in skip}
    settings |= {f"args.{key}": getattr(run.args, key) for key in _RESULT_SETTINGS if hasattr(run.args, key)}
    settings["method"] = run.method_name
    settings["strategies"] = [repr(strategy) for strategy in run.strategies]
    settings["base_model"] = getattr(run.model, "name_or_path", "")
    for number, task in enumerate(run.tasks):
        settings[f"task {number}"] = f"{task.name} {task.fingerprint()}"
    return settings

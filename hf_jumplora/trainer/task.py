"""What a task starts with: its adapter on top of the finished ones, in their place or beside them, and its trainer."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from transformers import Trainer

from ..stack.load import merge_finished
from ..tuner import JumpLoraConfig, fold_finished, named_layers
from .backend import fresh_accelerator


if TYPE_CHECKING:
    from .run import ContinualRun


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


def task_trainer(run: "ContinualRun", output_dir: Path, index: int, **kwargs: Any) -> Trainer:
    """The trainer of task number `index`, with the run's arguments.

    Raises:
        TypeError: the run's `trainer_cls` cannot be made of its arguments.
    """
    args = copy.copy(run.args)
    args.output_dir, args.seed = str(output_dir), run.args.seed + 1000 * index
    args.push_to_hub, args.hub_token = False, None  # the run pushes, not the trainer of a task
    if args.deepspeed_plugin is not None:
        args.bf16, args.mixed_precision = False, "no"  # see `cut_base`
        fresh_accelerator()
    try:
        return run.trainer_cls(
            model=run.model, args=args, data_collator=run.data_collator, processing_class=run.processing_class,
            strategies=run.strategies, callbacks=list(run.callbacks), **kwargs,
        )  # fmt: skip
    except (TypeError, AttributeError) as error:  # SFTTrainer itself, or ContinualSFTTrainer without an SFTConfig
        raise TypeError(
            f"{run.trainer_cls.__name__} cannot be made of {type(args).__name__} ({error}): trainer_cls is of "
            "make_continual, and args are of the class it takes (TRL's SFTTrainer: SFTConfig)"
        ) from error

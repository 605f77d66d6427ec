"""What a run checks before its first step, and the settings by which a restarted run knows itself."""

import copy
import logging
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from datasets import concatenate_datasets
from huggingface_hub.errors import HTTPError
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.trainer_utils import HubStrategy

from ..data.tasks import LanguageModelTask, TextTask
from ..hub import Pusher, explain, open_repository
from ..strategies import Osf, Replay, Strategy
from ..tuner import can_continue, ramp_steps
from .backend import check_engine
from .processes import sharding


if TYPE_CHECKING:
    from .run import ContinualRun


logger = logging.getLogger(__name__)

_RESULT_SETTINGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "lr_scheduler_kwargs", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "seed", "data_seed", "bf16", "fp16",
    "dataloader_drop_last", "train_sampling_strategy", "gate_learning_rate", "factor_optimizer",
    "loraplus_lr_ratio", "riemannian_reg", "max_length", "eval_mode",
    "eval_tasks",
)  # fmt: skip


def check_run(run: "ContinualRun") -> None:
    """Everything that can be checked before the first step. Raises ValueError that names the option, task or file."""
    if not isinstance(run.model, nn.Module):
        raise ValueError(f"model is a loaded model (AutoModelForCausalLM.from_pretrained(...)), got {run.model!r}")
    if not run.tasks:
        raise ValueError("a run needs at least one task")
    names = [task.name for task in (*run.tasks, *run.held_out)]
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
        if not isinstance(strategy, Strategy):
            raise ValueError(f"strategies holds Strategy objects such as KFac(weight=10.0), got {strategy!r}")
        strategy.check(run.method.mode, run.config)
    if any(isinstance(strategy, Osf) for strategy in run.strategies):
        _check_osf(run)
    if run.args.push_to_hub and (when := HubStrategy(run.args.hub_strategy).value) not in ("every_save", "end"):
        raise ValueError(
            f"hub_strategy={when!r} pushes checkpoints; a run pushes finished tasks: use "
            "'every_save' (after each task) or 'end'"
        )
    if run.args.load_best_model_at_end:
        raise ValueError("load_best_model_at_end would undo the end of the gate's ramp; leave it out")
    if run._text_tasks() and run.processing_class is None:
        raise ValueError("text tasks need processing_class (the tokenizer)")
    if run._text_tasks() and run.processing_class.eos_token_id is None:
        raise ValueError("text tasks need a tokenizer with an end-of-sequence token (eos_token): it ends the answers")
    if any(isinstance(task, LanguageModelTask) for task in run._text_tasks()) and not can_continue(run.model):
        raise ValueError(
            f"plain text is for causal language models, and {type(run.model).__name__} is none: leave "
            f"{next(t.name for t in run._text_tasks() if isinstance(t, LanguageModelTask))!r} out"
        )
    preferences = any(cls.__name__ == "DPOTrainer" for cls in run.trainer_cls.__mro__)
    if preferences and any(task.eval_dataset is not None for task in (*run.tasks, *run.held_out)):
        raise ValueError(
            "TRL's DPOTrainer cannot evaluate finished tasks (it wants an adapter 'default'): leave eval_dataset out"
        )
    check_engine(run)
    # The adapter is put in and taken out again: targets, ranks and layer types that cannot work show now.
    get_peft_model(run.model, copy.deepcopy(run.config)).unload()
    share = run.config.target_density if run.config.isolation == "hard" else None
    if share is not None and share * len(run.tasks) > 1:
        raise ValueError(
            f"isolation='hard' gives each entry to one task, and {len(run.tasks)} tasks that keep {share:.0%} each "
            f"need more than there are: target_density must be below {1 / len(run.tasks):.3f}"
        )
    if not any(isinstance(task, LanguageModelTask) for task in run.tasks):  # their steps are known once they are cut
        _check_ramps(run, stage_sizes(run))


def _check_ramps(run: "ContinualRun", stages: list[tuple[str, int]]) -> None:
    """Raise ValueError that names the task whose steps are too few for the gate's ramp."""
    for name, examples in stages if run.config.gate else ():
        if examples:  # none: a past task whose data is not at hand
            try:
                ramp_steps(planned_steps(run.args, examples), run.config)
            except ValueError as error:
                raise ValueError(f"task {name!r}: {error}") from error


def _check_osf(run: "ContinualRun") -> None:
    """OSF trains its own factors in place of the adapter's: raises ValueError for what acts on the adapter's."""
    others = [strategy for strategy in run.strategies if type(strategy) not in (Osf, Replay)]
    if others:
        raise ValueError(f"only Replay goes with OSF, not {others}: they act on the adapter's factors")
    if sharding(run.args) not in ("none", "ddp"):
        raise ValueError(
            "OSF reads whole weights and factors, which DeepSpeed and FSDP cut into pieces: train it with the whole "
            "model in each process (plain or DDP)"
        )
    for name, default in (("factor_optimizer", "default"), ("loraplus_lr_ratio", None)):
        if getattr(run.args, name, default) != default:
            raise ValueError(f"{name}={getattr(run.args, name)!r} is for A and B, and OSF trains neither: leave it out")


def stage_sizes(run: "ContinualRun") -> list[tuple[str, int]]:
    """(name, training examples) of each stage: a task, or all tasks at once in joint training."""
    sizes = [(task.name, 0 if task.train_dataset is None else len(task.train_dataset)) for task in run.tasks]
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
    settings |= {"args.world_size": run.args.world_size, "args.sharding": sharding(run.args)}
    settings["method"] = run.method_name
    settings["strategies"] = [repr(strategy) for strategy in run.strategies]
    settings["base_model"] = getattr(run.model, "name_or_path", "")
    settings["base_dtype"] = str(getattr(run.model, "dtype", ""))
    quantization = getattr(getattr(run.model, "config", None), "quantization_config", None)
    if quantization is not None:
        settings["quantization"] = quantization if isinstance(quantization, dict) else quantization.to_dict()
    texts = [task.fingerprint() for task in run.held_out if isinstance(task, LanguageModelTask)]
    if texts and any(getattr(strategy, "general", None) is not None for strategy in run.strategies):
        settings["general"] = texts
    for number, task in enumerate(run.tasks):
        settings[f"task {number}"] = f"{task.name} {task.fingerprint()}"
    return settings


def push_options(run: "ContinualRun") -> dict[str, Any]:
    """What `push_stack` needs of the training arguments."""
    args = run.args
    return {
        "token": args.hub_token,
        "private": args.hub_private_repo,
        "revision": args.hub_revision or "main",
        "template": getattr(args, "model_card_template", None),
    }


def start_push(run: "ContinualRun") -> Pusher | None:
    """Make the repository, refuse one that holds something else, and start the thread that pushes; None without
    push_to_hub. A Hub that cannot be reached or refuses the token does not stop the training, and is logged.

    Raises:
        ValueError: the repository holds something else, or its owner is not known.
    """
    if not run.args.push_to_hub:
        return None
    options = push_options(run)
    name = run.args.hub_model_id or run.output_dir.resolve().name
    try:
        where = {key: value for key, value in options.items() if key != "template"}
        name = open_repository(run.output_dir, name, **where)
    except (HTTPError, OSError) as error:
        if "/" not in name:
            raise ValueError(
                f"the Hub did not say who owns {name!r} ({error}): give hub_model_id='owner/name'"
            ) from error
        logger.error("the Hub cannot be used now; finished tasks wait in %s: %s", run.output_dir, explain(error, name))
    run.repo_id = name
    pusher = Pusher(run.output_dir, name, **options)
    pusher.start()
    pusher.push()  # what an earlier process left
    return pusher


def encode_tasks(run: "ContinualRun") -> list[Any]:
    """The training set of every stage; all texts are encoded before the first step, so that bad ones show now."""
    encoded = (TextTask, LanguageModelTask)
    sets = [run.encoder.train_rows(t) if isinstance(t, encoded) else t.train_dataset for t in run.tasks]
    for task in (*run.tasks, *run.held_out):
        if isinstance(task, TextTask):
            if names := task.names_in_prompt():
                logger.warning(
                    "task %s: every prompt names the data set (%s), which tells the model the task: such numbers "
                    "cannot be compared with those of prompts that do not", task.name, ", ".join(names)
                )  # fmt: skip
            for row in task.eval_dataset or ():
                run.encoder.prompt_ids(task, row[task.text_column])
            if cut := run.encoder.truncated[task.name]:
                logger.warning(
                    "task %s: %d texts were cut to fit max_length=%d", task.name, cut, run.encoder.max_length
                )
    run.truncated = Counter(run.encoder.truncated)  # evaluations go on counting
    sets = sets if run.method.mode != "joint" else [concatenate_datasets(sets)]
    _check_ramps(run, [(name, len(rows or ())) for (name, _), rows in zip(stage_sizes(run), sets, strict=True)])
    return sets


def place_model(run: "ContinualRun") -> None:
    """The Trainer puts the model on its device when training starts; the zero-shot row comes before."""
    placed = getattr(run.model, "hf_device_map", None) or getattr(run.model, "is_quantized", False)
    if not placed and sharding(run.args) not in ("zero3", "fsdp2"):
        run.model.to(run.args.device)

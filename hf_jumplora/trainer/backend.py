"""DeepSpeed and FSDP: one engine after another in the same process, and what they cannot do."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..strategies.base import Examples
from ..tuner import named_layers
from ..tuner.sharded_parameters import master
from .processes import sharding


if TYPE_CHECKING:
    from .run import ContinualRun


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


def check_engine(run: "ContinualRun") -> None:
    """Raises ValueError, naming the option and what to do, for what cannot work with DeepSpeed or FSDP."""
    kind = sharding(run.args)
    if kind in ("none", "ddp"):
        return
    if kind == "zero0":
        raise ValueError("DeepSpeed with ZeRO stage 0 is DDP: use recipes/accelerate/ddp.yaml, or stage 1, 2 or 3")
    if run.args.fp16:
        raise ValueError(f"fp16=True scales losses, and is not tested with {kind}: use bf16=True")
    for task in (*run.tasks, *run.held_out):
        if task.eval_dataset is not None and task not in run._text_tasks():
            raise ValueError(
                f"task {task.name!r} is evaluated by the Trainer itself, which is not supported with {kind}: make it a "
                "TextTask, leave its eval_dataset out, or train with DDP"
            )
    if kind in ("zero3", "fsdp2"):
        for strategy in run.strategies:
            if strategy.needs_whole_model:
                raise ValueError(
                    f"strategy {strategy!r} needs the whole model in each process, which {kind} cuts into pieces: use "
                    "zero1, zero2 or DDP"
                )
        if getattr(run.model, "is_quantized", False):
            raise ValueError(f"a quantised base cannot be cut into pieces by {kind}: use DDP, zero1 or zero2")
    if kind.startswith("zero"):
        if run.args.bf16 and getattr(run.model, "dtype", None) != torch.bfloat16:
            raise ValueError(
                f"bf16=True with {kind} trains float32 factors over a base in bf16, and this one is "
                f"{run.model.dtype}: load it with dtype=bfloat16 (--dtype bfloat16)"
            )
        config = run.args.deepspeed_plugin.deepspeed_config
        zero = config.get("zero_optimization", {})
        found = [(key, why) for key, why in _NOT_WITH_DEEPSPEED.items() if config.get(key)]
        for key, (default, why) in _NOT_WITH_ZERO.items():
            if zero.get(key, default) is not default:
                found.append((f"zero_optimization.{key}", why))
        if zero.get("offload_param", {}).get("device") == "nvme":
            found.append(("zero_optimization.offload_param.device=nvme", "merging reads weights in memory: use cpu"))
        if found:
            raise ValueError(f"the DeepSpeed config has {found[0][0]!r}: {found[0][1]}")


def fresh_accelerator() -> None:
    """Lets a further Trainer of this process have its own engine (transformers issue 35073)."""
    AcceleratorState._reset_state()


def release(trainer: Any) -> None:
    """End DeepSpeed's engine of a finished training. Adapters are whole float32 tensors again, the trained one from the
    master copies; weights of the base that ZeRO-3 has cut stay so. Does nothing without DeepSpeed."""
    if not trainer.is_deepspeed_enabled:
        return
    model, places = trainer.model, _adapter_places(trainer.model)
    values = [master(module._parameters[key]) for module, key in places]
    _end(trainer.deepspeed)
    trainer.accelerator.deepspeed_engine_wrapped = None
    trainer.accelerator.free_memory()
    trainer.deepspeed = trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    trainer.model_wrapped = model
    _forget_engine(model, places, values)


def _adapter_places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, name in it) of every parameter of every adapter."""
    places: dict[tuple[nn.Module, str], None] = {}
    for _, layer in named_layers(model):
        gates = [(gate, "log_tau") for gate in layer.jumplora_gate.values()]
        factors = [(d, adapter) for d in (layer.jumplora_A, layer.jumplora_B) for adapter in d]
        places |= dict.fromkeys([*gates, *factors])
    return list(places)


def _end(engine: Any) -> None:
    """As DeepSpeed ends an engine, and without what would keep all of it: two hooks of the model, and the caches of a
    class, whose keys are parts of the engine."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.empty_partition_cache()
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for method in filter(inspect.isfunction, vars(PartitionedParameterCoordinator).values()):
        for inner in inspect.getclosurevars(method).nonlocals.values():
            if hasattr(inner, "cache_clear"):
                inner.cache_clear()


def _forget_engine(model: nn.Module, places: list[tuple[nn.Module, str]], values: list[torch.Tensor]) -> None:
    """Adapters become plain parameters of these values. And what DeepSpeed leaves in the modules, references to
    parameters that are gone, would be found by the next engine."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK.clear()
    for module in model.modules():
        if type(module._parameters) is not dict:
            module._parameters = dict(module._parameters)
        for name in ("_original_parameters", "pre_bwd_fn", "post_bwd_fn"):  # an engine takes over what is there
            vars(module).pop(name, None)
        getattr(module, "_external_params", {}).clear()
    for (module, key), value in zip(places, values, strict=True):
        module._parameters[key] = nn.Parameter(value, module._parameters[key].requires_grad)


def cut_base(model: nn.Module, args: Any) -> None:
    """Under ZeRO-3 and FSDP2 each process keeps a piece of each weight of the frozen base, from here on: what merging
    remembers of a weight must not be whole once and a piece later.

    FSDP2 leaves adapters, which are put in later, whole in every process, and DDP adds up their gradients.

    Raises:
        ValueError: the model does not say which of its modules are its blocks.
    """
    if args.deepspeed_plugin is not None:
        # It would round A, B and thresholds to bf16, in which the support is another one. They stay as they are.
        args.deepspeed_plugin.deepspeed_config["bf16"] = {"enabled": False}
        args.deepspeed_plugin.hf_ds_config.config["bf16"] = {"enabled": False}
    if sharding(args) == "zero3":
        with runnable(model, args):  # its engine cuts what `from_pretrained` has not
            return
    if sharding(args) != "fsdp2":
        return
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"FSDP cuts a model by its blocks, and {type(model).__name__} names none (_no_split_modules): use "
            "recipes/accelerate/zero3.yaml"
        )
    model.requires_grad_(False)
    mesh = init_device_mesh(args.device.type, (torch.distributed.get_world_size(),))
    for module in [*blocks, model]:
        name, where = type(module).__name__, type(module).__module__
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        type(module).__name__, type(module).__module__ = name, where  # of a class made for it: PEFT writes them down
    # `generate` of an encoder-decoder runs the encoder before the whole model, which would make each block a root.
    fully_shard.state(model)._lazy_init()  # type: ignore[attr-defined]
    model._is_fsdp_managed_module = True  # type: ignore[assignment]  # `generate` then runs equally often everywhere


def ignore_cut_weights(model: nn.Module) -> None:
    """DDP leaves alone what FSDP2 has cut."""
    cut = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, cut)


@contextmanager
def runnable(model: Any, args: Any) -> Iterator[None]:
    """Inside, a model whose weights ZeRO-3 has cut, or would cut, can run: an engine without optimizer gathers them.
    Of a model that FSDP2 has cut, parts of it can be called too."""
    kind, base = sharding(args), model.get_base_model() if hasattr(model, "get_base_model") else model
    if kind == "fsdp2" and isinstance(base, FSDPModule):
        base.set_reshard_after_forward(False, recurse=False)
        base.unshard()
        try:
            yield
        finally:
            base.set_reshard_after_forward(True, recurse=False)
            base.reshard()
        return
    if kind != "zero3":
        yield
        return
    import deepspeed

    config = args.deepspeed_plugin.deepspeed_config
    zero = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
    own = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    places = _adapter_places(model)
    values = [module._parameters[key].detach().clone() for module, key in places]
    engine = deepspeed.initialize(model=model, config=own)[0]
    try:
        yield
    finally:
        _end(engine)
        _forget_engine(model, places, values)


def call_strategies(run: "ContinualRun", hook: str, examples: Examples) -> None:
    """`on_task_start` or `on_task_end` of all strategies; those that run the model can."""
    for strategy in run.strategies:
        with runnable(run.model, run.args) if strategy.runs_model else nullcontext():
            getattr(strategy, hook)(run.model, "default", examples)

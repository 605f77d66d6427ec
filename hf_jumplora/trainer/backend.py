"""DeepSpeed and FSDP: which of them trains, where the model is, and one engine after another in the same process."""

import inspect
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..tuner import named_layers
from ..tuner.sharded_parameters import master


def sharding(args: Any) -> str:
    """How the model and its training are spread: "none" (one process), "ddp", "zero1" to "zero3" or "fsdp2"."""
    if args.deepspeed_plugin is not None:
        return f"zero{args.deepspeed_plugin.zero_stage}"
    if getattr(args, "shards_base", False):
        return "fsdp2"
    return "ddp" if args.world_size > 1 else "none"


def check_compiler(args: Any) -> None:
    """Raise RuntimeError when DeepSpeed would have to compile an extension and cannot.

    On a CPU DeepSpeed's communication is such an extension, compiled when the first process group is made and then kept
    in TORCH_EXTENSIONS_DIR; without a compiler that ends in a traceback of ninja's, and with the lock of a process that
    was killed meanwhile it never ends.
    """
    wanted = args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if not wanted or torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    compiler = os.environ.get("CXX", "c++")
    missing = [name for name in (compiler, "ninja") if shutil.which(name) is None]
    if missing:
        raise RuntimeError(
            f"DeepSpeed compiles an extension for training on a CPU, and {' and '.join(missing)} cannot be found: "
            "install a C++ compiler and ninja (apt install g++; pip install ninja), name the compiler in the "
            "environment variable CXX, or train without DeepSpeed (recipes/accelerate/cpu2.yaml)"
        )
    from torch.utils.cpp_extension import get_default_build_root  # imports setuptools

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in folder.glob("**/deepspeed_shm_comm/lock"):
        with suppress(FileNotFoundError):  # released meanwhile
            if time.time() - lock.stat().st_mtime > 600:  # compiling takes a minute or two
                raise RuntimeError(
                    f"DeepSpeed would wait for ever for {lock}, which was left by a process that was killed: delete it"
                )


_FSDP_OPTIONS = {
    "FSDP_VERSION": ("2", "fsdp_version: 1 mixes frozen and trained weights in one tensor: use fsdp_version: 2"),
    "FSDP_OFFLOAD_PARAMS": ("false", "fsdp_offload_params is not supported: use recipes/accelerate/zero3_offload.yaml"),
    "FSDP_RESHARD_AFTER_FORWARD": (
        "true", "fsdp_reshard_after_forward: false leaves copies in which merged tasks would be missing: use true"
    ),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "false", "fsdp_cpu_ram_efficient_loading leaves the base empty in all processes but one: use false"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false", "fsdp_activation_checkpointing is not supported: use gradient_checkpointing=True"
    ),
}  # fmt: skip


def take_fsdp(args: Any) -> bool:
    """Whether `accelerate launch` asks for FSDP2. From here on the run shards the frozen base itself, and transformers
    and accelerate train the adapters with DDP: their own way would shard the adapters too, once and for the first task
    alone.

    Raises:
        ValueError: an option of FSDP that is not supported.
    """
    if args.fsdp:
        raise ValueError("the argument fsdp is not supported: start with recipes/accelerate/fsdp2.yaml")
    if "FSDP_VERSION" not in os.environ:  # `accelerate launch` sets it for FSDP alone
        return False
    for name, (wanted, why) in _FSDP_OPTIONS.items():
        if os.environ.get(name, wanted).lower() != wanted:
            raise ValueError(why)
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return True


def place_model(model: Any, args: Any) -> None:
    """The Trainer puts the model on its device when training starts; the zero-shot row comes before."""
    placed = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    if not placed and sharding(args) not in ("zero3", "fsdp2"):
        model.to(args.device)


def fresh_accelerator() -> None:
    """Lets a further Trainer of this process have its own engine (transformers issue 35073)."""
    AcceleratorState._reset_state()


def release(trainer: Any) -> None:
    """End DeepSpeed's engine of a finished training. Adapters are whole float32 tensors again, the trained one from the
    master copies; weights of the base that ZeRO-3 has sharded stay so. Does nothing without an engine."""
    if not trainer.is_deepspeed_enabled or trainer.deepspeed is None:
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


def end_autocast(accelerator: Any, model: nn.Module) -> None:
    """Take off what bf16=True or fp16=True has put around a model's forward pass: a loaded stack computes without it,
    and every training puts its own around the model, the first one after a restart too."""
    if "_original_forward" in vars(model):
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        vars(model).pop("_is_accelerate_prepared", None)


def _adapter_places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, name in it) of A, B and log_tau of every adapter; methods with other parameters refuse DeepSpeed."""
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


def shard_base(model: nn.Module, args: Any) -> None:
    """Under ZeRO-3 and FSDP2 each process keeps a piece of each weight of the frozen base, from here on: what merging
    remembers of a weight must not be whole once and a piece later.

    FSDP2 leaves adapters, which are put in later, whole in every process, and DDP adds up their gradients.

    Raises:
        ValueError: the model does not say which of its modules are its blocks.
    """
    if args.deepspeed_plugin is not None:
        # It would round A, B and thresholds to bf16, in which the support would change. They stay as they are.
        args.deepspeed_plugin.deepspeed_config["bf16"] = {"enabled": False}
        args.deepspeed_plugin.hf_ds_config.config["bf16"] = {"enabled": False}
    if sharding(args) == "zero3":
        with runnable(model, args):  # its engine shards what `from_pretrained` has not
            return
    if sharding(args) != "fsdp2":
        return
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"FSDP shards a model by its blocks, and {type(model).__name__} names none (_no_split_modules): use "
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


def ignore_sharded_weights(model: nn.Module) -> None:
    """DDP leaves alone what FSDP2 has sharded."""
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)


@contextmanager
def runnable(model: Any, args: Any) -> Iterator[None]:
    """Inside, a model whose weights ZeRO-3 has sharded, or would shard, can run: an engine without optimizer gathers
    them. Of a model that FSDP2 has sharded, parts can be called too."""
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

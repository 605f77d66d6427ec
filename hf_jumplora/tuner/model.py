"""`JumpLoraModel`: places gated updates into a model, and loads the parents of a stacked task."""

import difflib
import os
import re
import warnings
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import nn

from .config import JumpLoraConfig, of_layer
from .gate import JumpGate
from .layer import JumpLoraLayer, Linear
from .lookup import named_layers
from .peft_compat import real_parameters, set_active
from .sharded_parameters import full_shape


_CONV = (nn.Conv1d, nn.ConvTranspose1d)
ADAPTER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*(_[A-Za-z0-9-]+)*")


def check_adapter_name(model: nn.Module, *adapters: str) -> None:
    """PEFT tells adapters in a state dict by path components: a name that is also a module's would mix them up.

    Raises:
        ValueError: the name cannot be told from a part of a module's name.
    """
    names = [name for name, _ in model.named_modules() if ".jumplora_" not in name and ".modules_to_save." not in name]
    parts = {part for name in names for part in name.split(".")} | {"log_tau", "mix", "weight", "bias"}
    for adapter in adapters:
        if adapter in parts or adapter.startswith("jumplora") or not ADAPTER_NAME.fullmatch(adapter):
            raise ValueError(
                f"adapter name {adapter!r}: use letters, digits, '-' and '_', starting with a letter, and no name of a "
                "module of the model (for example 'default' or 'task_000')"
            )


def gate_key(layer_name: str, scope: str) -> str:
    """Layers of one key share a gate: all ("global"), or those of one block, by the first number in the name; with
    "layer" each has its own."""
    if scope == "global":
        return ""
    block = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", layer_name)
    return block.group(1) if scope == "block" and block else layer_name


class JumpLoraModel(BaseTuner):
    """The PEFT tuner of JumpLoRA (arXiv 2604.16171). Made by `get_peft_model(model, JumpLoraConfig(...))`.

    Raises:
        ValueError: no target module matches (near names are listed), a target shares its weight with another module,
            an adapter's name cannot be told from a module's, a parent adapter is missing, or a finished adapter was
            asked to train on.
        NotImplementedError: mixed batches (`adapter_names=`).
    """

    prefix = "jumplora_"
    tuner_layer_cls = JumpLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        config: Any = self.peft_config[adapter_name]
        try:
            check_adapter_name(model, adapter_name)
        except ValueError:
            self.peft_config.pop(adapter_name)
            raise
        if config.support is not None and not config.inference_mode:
            raise ValueError(
                f"adapter {adapter_name!r} is finished: its update is its saved support and cannot be trained on. Add "
                f"a new adapter with parent_adapters=[{adapter_name!r}] instead"
            )
        everything = not config.inference_mode and str(config.target_modules).lower() == "all-linear"  # PEFT expands it
        _keep_differentiable(model, config)
        self._load_parents(model, config)
        self._gates: dict[str, JumpGate] = {}  # of this adapter, by gate_key
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(f"{error} {_near_names(model, config.target_modules)}") from error
        _check_tied(model)
        if everything:
            _tell_of_experts(model)

    def _load_parents(self, model: nn.Module, config: JumpLoraConfig) -> None:
        """Parents that are not in the model yet are loaded from the folders beside the adapter's own."""
        folded = {name for _, layer in named_layers(model) for name in layer.finished.folded}
        for parent in [p for p in config.parent_adapters if p not in self.peft_config and p not in folded]:
            if config.origin is None:
                raise ValueError(
                    f"parent adapter {parent!r} is not in the model: add or load it first, or load the whole stack "
                    "with hf_jumplora.load_stack(...) or PeftModel.from_pretrained(base_model, stack, subfolder=...)"
                )
            check_adapter_name(model, parent)  # from a file: a name, never a path
            path, subfolder, hub = (config.origin[k] for k in ("path", "subfolder", "kwargs"))
            inside = os.path.join(subfolder or "", parent)  # PEFT's save_pretrained puts it there beside "default"
            if os.path.isfile(os.path.join(path, inside, "adapter_config.json")) or (
                subfolder is None and not os.path.isdir(path)
            ):
                beside: str | None = inside
            elif subfolder is None:
                path, beside = os.path.join(os.path.dirname(os.path.abspath(path)), parent), None
            else:
                beside = os.path.join(os.path.dirname(subfolder), parent)
            try:
                parent_config = JumpLoraConfig.from_pretrained(path, subfolder=beside, **hub)
                weights = load_peft_weights(path, device="cpu", subfolder=beside, **hub)
            except (ValueError, OSError) as error:
                where = path if beside is None else f"{path}, folder {beside}"
                raise ValueError(
                    f"this adapter was trained on top of {parent!r}, which cannot be loaded from {where} ({error}). "
                    "To load a task without its parents use hf_jumplora.load_stack(..., tasks=[...])"
                ) from error
            parent_config.inference_mode = True
            self.peft_config[parent] = parent_config
            with real_parameters():
                self.inject_adapter(model, parent)
                model.peft_config = self.peft_config  # type: ignore[assignment]  # BaseTuner does the same once it is complete
                result: Any = set_peft_model_state_dict(model, weights, parent)
            missing = [key for key in result.missing_keys if f".{parent}" in key]
            if missing or result.unexpected_keys:
                raise ValueError(
                    f"{os.path.join(path, beside or '', 'adapter_model.safetensors')} does not fit: missing "
                    f"{missing[:3]}, unexpected {result.unexpected_keys[:3]}"
                )

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ):
        name = current_key
        r, alpha = rank_and_alpha(peft_config, name)
        base = target.get_base_layer() if isinstance(target, JumpLoraLayer) else target
        if peft_config.fan_in_fan_out and isinstance(base, nn.Linear):
            raise ValueError(
                f"fan_in_fan_out=True, but {name} is an nn.Linear, whose weight is [out, in]: leave it out"
            )
        gate = None
        if peft_config.gate:
            gate = self._gates.setdefault(gate_key(name, peft_config.threshold_scope), JumpGate())
        if isinstance(target, JumpLoraLayer):
            target.update_layer(adapter_name, peft_config, r, alpha, gate)
            return
        layer = Linear(target, name, **get_quantization_kwargs(self))
        set_active(layer, self.active_adapters)
        layer.update_layer(adapter_name, peft_config, r, alpha, gate)
        self._replace_module(parent, target_name, layer, target)

    def add_finished(self, adapter: str, config: JumpLoraConfig, weights: dict[str, torch.Tensor]) -> bool:
        """Add a finished adapter of every layer that is adapted already, from the tensors of its file.

        PEFT's own way walks over the modules of all adapters for each new one: a stack would load in the square of
        the number of its tasks. False, with nothing done, if the tensors are not exactly those of these layers: then
        PEFT's way adds it, or says what does not fit. The caller has checked the name.
        """
        layers = dict(named_layers(self.model))
        shapes: dict[str, tuple[int, ...]] = {}
        for name, layer in layers.items():
            r, key = rank_and_alpha(config, name)[0], f"base_model.model.{name}.jumplora_"
            shapes |= {f"{key}A": (r, layer.in_features), f"{key}B": (layer.out_features, r)}
            if config.gate:
                shapes |= {f"{key}gate.log_tau": (1,), f"{key}gate.mix": (1,)}
            if config.support is not None and name in config.support:
                shapes[f"{key}support"] = (config.support[name][0],)
        other = config.modules_to_save or config.trainable_token_indices or (config.gate and config.support is None)
        if other or not config.inference_mode or shapes != {key: tuple(t.shape) for key, t in weights.items()}:
            return False
        gates: dict[str, JumpGate] = {}
        for name, layer in layers.items():
            key = f"base_model.model.{name}.jumplora_"
            gate = gates.setdefault(gate_key(name, config.threshold_scope), JumpGate()) if config.gate else None
            if gate is not None:
                gate.log_tau.data.copy_(weights[f"{key}gate.log_tau"])
                gate.mix.copy_(weights[f"{key}gate.mix"])
            A, B, code = (weights.get(f"{key}{part}") for part in ("A", "B", "support"))
            layer.add_finished(adapter, config, rank_and_alpha(config, name)[1], gate, A, B, code)
        self.peft_config[adapter] = config
        return True

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # A layer has moved its adapter already, a module that is unloaded has its own weight. PEFT would move the layer
        # to the device of the weight, "meta" for an offloaded one, and set a weight, which not every module can take.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing to cast: adapters are float32 from the start and stay so (docs/decisions.md)."""
        if not autocast_adapter_dtype:
            warnings.warn(
                "autocast_adapter_dtype=False is ignored: JumpLoRA adapters are float32 whatever the base's dtype; in "
                "bf16 their supports would change",
                stacklevel=2,
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names=None, **kwargs):
        """PEFT's entry for `adapter_names=`, which other tuners than LoRA silently ignore."""
        if adapter_names is not None:
            raise NotImplementedError(
                "adapter_names= (another adapter for each row of a batch) is not supported by JumpLoRA: use one stack "
                "for the whole batch, or load_stack(..., tasks=[...]) for each group of rows"
            )
        yield

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # A gate is shared by layers and safetensors refuses shared memory: every layer's entry gets its own copy.
        return {k: v.clone() if ".jumplora_gate." in k else v for k, v in selected.items()}

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's. Raises ValueError when another adapter stands on this one."""
        for _, layer in named_layers(self.model, adapter_name):
            layer.check_no_children(adapter_name)
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """The base model, with the weights it had: merged tasks are taken out first (`load_stack` merges them)."""
        self.unmerge_adapter()
        return super().unload()

    def _check_merge_allowed(self) -> None:
        """Before any weight is changed. Raises ValueError when a layer is quantised."""
        super()._check_merge_allowed()
        for _, layer in named_layers(self.model):
            layer.finished.check_mergeable()


def _keep_differentiable(model: nn.Module, config: JumpLoraConfig) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights in the first forward pass in evaluation mode. From
    then on a layer passes no gradient to its input and rounds its scales to bf16: switch that off.

    Raises:
        ValueError: it has happened already, and the adapter is to be trained.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False) and not config.inference_mode:
            raise ValueError(
                f"bitsandbytes has repacked the 4-bit weights of {name} for inference on this CPU, where they give no "
                "gradients: load the base model again and add the adapter before its first forward pass"
            )


def _check_tied(model: nn.Module) -> None:
    """Raise ValueError when an adapted weight is also another module's: merging would change that one too."""
    layers: list[tuple[str, JumpLoraLayer]] = []
    owners: dict[int, str] = {}  # id of a weight -> a module that holds it and is no part of an adapted layer
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> None:
        if module in seen:  # one module under two names is no tie
            return
        seen.add(module)
        if isinstance(module, JumpLoraLayer):
            layers.append((name, module))
            return
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), name)
        for part, child in module.named_children():
            walk(f"{name}.{part}" if name else part, child)

    walk("", model)
    for name, layer in layers:
        weight = getattr(layer.get_base_layer(), "weight", None)  # some quantised layers have none
        if weight is not None and (other := owners.setdefault(id(weight), name)) != name:
            raise ValueError(
                f"the weight of target module {name} is that of {other} too (tied), and merging a task would change "
                "both: leave it out of target_modules, or untie them in the base model first (a copy of the weight, "
                "and tie_word_embeddings=False in its config)"
            )


def _tell_of_experts(model: nn.Module) -> None:
    """Warn of weights that are no linear layers, as the experts of transformers 5 are: "all-linear" leaves them out."""
    total, names = 0, {}
    for name, parameter in model.named_parameters():
        if ".jumplora_" not in name:
            size = full_shape(parameter).numel()
            total += size
            if len(full_shape(parameter)) == 3 and not isinstance(model.get_submodule(name.rpartition(".")[0]), _CONV):
                names[name] = size
    if names:
        warnings.warn(
            f'target_modules="all-linear" adapts linear layers alone: {sum(names.values()) / total:.0%} of the weights '
            f"are experts kept as 3D parameters ({next(iter(names))}, ...), which JumpLoRA cannot adapt; they stay as "
            "they are",
            stacklevel=2,
        )


def rank_and_alpha(config: JumpLoraConfig, name: str) -> tuple[int, float]:
    """r and lora_alpha of a layer."""
    return of_layer(config.rank_pattern, name, config.r), of_layer(config.alpha_pattern, name, config.lora_alpha)


def _near_names(model: nn.Module, targets) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name]
    linear = sorted({name.removesuffix(".base_layer").split(".")[-1] for name in names})
    wanted = [targets] if isinstance(targets, str) else list(targets or [])
    near = sorted({hit for w in wanted for hit in difflib.get_close_matches(w, linear, cutoff=0.4)})
    return f"Near names: {', '.join(near)}." if near else f"Linear layers of this model: {', '.join(linear)}."

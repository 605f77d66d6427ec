"""The tuner layer: a frozen linear layer, the update in training, and the frozen updates of the earlier tasks."""

import math

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..ops import gated_linear
from ..ops.sparse import decode_support, encode_support, pack_bits, sparse_linear, support_sha256, to_csr, unpack_bits
from .config import JumpLoraConfig
from .gate import Float32ParameterDict, JumpGate


class JumpLoraLayer(nn.Module, BaseTunerLayer):
    """Wraps an `nn.Linear`, a `Conv1D` or a quantised linear layer of weight [out, in].

    Several adapters can live here; PEFT only ever sees one active. The active adapter brings its parents with it (the
    implicit stack): y = base(x) + sum over the adapter and all its ancestors of scaling * x E^T. Ancestors are frozen.
    A finished adapter has a saved support, and its update is D on that support: the threshold is not evaluated again.
    """

    adapter_layer_names = ("jumplora_A", "jumplora_B", "jumplora_gate")
    other_param_names = ("jumplora_support", "jumplora_dropout", "configs", "scaling", "free")

    def __init__(self, base_layer: nn.Module, name: str, **kwargs):
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = name
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        if self.quantization_backend is None and not isinstance(base_layer, (nn.Linear, Conv1D)):
            raise TypeError(
                f"target module {name} is a {type(base_layer).__name__}; only linear layers (nn.Linear, Conv1D, "
                "quantised linear) can be adapted: narrow `target_modules` or use `exclude_modules`"
            )
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        assert in_features is not None  # true of every linear layer
        assert out_features is not None
        self.in_features, self.out_features = in_features, out_features
        self.transposed = isinstance(base_layer, Conv1D)
        self.jumplora_A = Float32ParameterDict()  # adapter -> [r, in]
        self.jumplora_B = Float32ParameterDict()  # adapter -> [out, r]
        self.jumplora_gate = nn.ModuleDict()
        self.jumplora_support = BufferDict(persistent=True)  # finished adapter -> uint8, coded as on disk
        self.jumplora_dropout = nn.ModuleDict()
        self.configs: dict[str, JumpLoraConfig] = {}
        self.scaling: dict[str, float] = {}
        self.free: dict[str, torch.Tensor] = {}  # adapter under hard isolation -> packed bits
        self.frozen_peft_weight_names = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = []
        self._restore: tuple[torch.Tensor, torch.Tensor] | None = None
        self._remerge: list[str] = []
        self._past_sum: tuple[tuple, tuple] | None = None

    def update_layer(self, adapter: str, config: JumpLoraConfig, r: int, alpha: float, gate: JumpGate | None) -> None:
        """Add an adapter. Raises ValueError when `r` is larger than the layer, or not positive."""
        if r < 1:
            raise ValueError(f"r = {r} of layer {self.layer_name} must be a positive integer (see `rank_pattern`)")
        if r > min(self.in_features, self.out_features):
            raise ValueError(
                f"r = {r} is larger than layer {self.layer_name} ({self.out_features} x {self.in_features}): lower r, "
                "or give this layer its own rank in `rank_pattern`"
            )
        self.jumplora_A[adapter] = nn.Parameter(torch.empty(r, self.in_features, dtype=torch.float32))
        self.jumplora_B[adapter] = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.jumplora_A[adapter], a=math.sqrt(5))  # as PEFT's LoRA
        if not config.init_weights:
            nn.init.normal_(self.jumplora_B[adapter], std=1 / r)
        if gate is not None:
            self.jumplora_gate[adapter] = gate
            if config.threshold_update != "learned":  # the schedule sets it, no optimizer may move it
                self.frozen_peft_weight_names[adapter] = ("jumplora_gate",)
        self.jumplora_dropout[adapter] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.configs[adapter] = config
        self.scaling[adapter] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        if config.support is not None:
            self.jumplora_support[adapter] = torch.zeros(config.support[self.layer_name][0], dtype=torch.uint8)
            self._freeze(adapter)
        elif config.isolation == "hard":
            self.free[adapter] = pack_bits(~self.occupied(config.parent_adapters))
        self._past_sum = None
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's. Raises ValueError when another adapter stands on this one."""
        self.check_no_children(adapter_name)
        super().delete_adapter(adapter_name)
        self._past_sum = None

    def check_no_children(self, adapter: str) -> None:
        """Raise ValueError when another adapter names this one as its parent: without it, that is another update."""
        children = [name for name, config in self.configs.items() if adapter in config.parent_adapters]
        if children:
            raise ValueError(f"adapter {adapter!r} is a parent of {children}: delete those first")

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._past_sum = None  # it was summed from other values
        super()._load_from_state_dict(*args, **kwargs)

    def _freeze(self, adapter: str) -> None:
        self.frozen_peft_weight_names[adapter] = self.adapter_layer_names
        self._freeze_non_trainable_peft_weights(adapter)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        """Device only. PEFT would also cast to the base's dtype, and in bf16 the support is another one."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        meta = torch.device("meta")
        if device is None or device == meta:
            return
        for container in (self.jumplora_A, self.jumplora_B, self.jumplora_support, self.free):
            if adapter_name in container and container[adapter_name].device != meta:
                container[adapter_name] = container[adapter_name].to(device)
        if adapter_name in self.jumplora_gate and self.gate(adapter_name).log_tau.device != meta:
            self.jumplora_gate[adapter_name].to(device)

    def gate(self, adapter: str) -> JumpGate:
        """The gate of an adapter, shared with the other layers of its scope."""
        gate = self.jumplora_gate[adapter]
        assert isinstance(gate, JumpGate)
        return gate

    # ---- what an adapter adds -------------------------------------------------------------------------------------

    def closure(self, adapters) -> list[str]:
        """These adapters and all their ancestors on this layer, ancestors first, each once."""
        order: list[str] = []
        for name in adapters:
            if name in self.configs:
                for ancestor in (*self.closure(self.configs[name].parent_adapters), name):
                    if ancestor not in order:
                        order.append(ancestor)
        return order

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(A [r, in], B [out, r], packed bits of the entries it may use or None)."""
        return self.jumplora_A[adapter], self.jumplora_B[adapter], self.free.get(adapter)

    def product(self, adapter: str) -> torch.Tensor:
        """D = B A without gradient: [out, in], float32 under autocast too."""
        A, B = self.jumplora_A[adapter].detach(), self.jumplora_B[adapter].detach()
        with torch.autocast(A.device.type, enabled=False):
            return B @ A

    def support(self, adapter: str) -> torch.Tensor:
        """Which entries the update keeps: bool [out, in]. Of a finished adapter: the saved ones, checked.

        Raises:
            ValueError: the saved support is not the one whose sha256 the adapter's config names.
        """
        if adapter in self.jumplora_support:
            code, entry = self.jumplora_support[adapter], self.configs[adapter].support
            expected = entry[self.layer_name][1] if entry else None
            found = support_sha256(code)
            if found != expected:
                raise ValueError(
                    f"adapter {adapter!r}, layer {self.layer_name}: the saved support has sha256 {found}, its config "
                    f"says {expected}; the file is damaged or belongs to another adapter"
                )
            return decode_support(code, (self.out_features, self.in_features)).to(code.device)
        D = self.product(adapter)
        if adapter not in self.jumplora_gate:
            return torch.ones_like(D, dtype=torch.bool)
        return self.mask_free(adapter, D.abs() > self.gate(adapter).log_tau.detach().exp())

    def mask_free(self, adapter: str, mask: torch.Tensor) -> torch.Tensor:
        """`mask` [out, in] without the entries that hard isolation closes to this adapter."""
        if adapter not in self.free:
            return mask
        return mask & unpack_bits(self.free[adapter], 0, mask.numel()).view_as(mask)

    def occupied(self, adapters) -> torch.Tensor:
        """Union of the supports of finished adapters and their ancestors: bool [out, in], on the CPU."""
        union = torch.zeros(self.out_features, self.in_features, dtype=torch.bool)
        for name in self.closure(adapters):
            if name not in self.jumplora_support:
                raise ValueError(
                    f"isolation='hard' needs parents with a saved support, and {name!r} has none: finish it first "
                    "(`finish_adapter`), or use parents trained with a gate"
                )
            union |= self.support(name).cpu()
        return union

    @torch.no_grad()
    def update(self, adapter: str) -> torch.Tensor:
        """scaling * E as it acts now: float32 [out, in], without gradient."""
        E = self.product(adapter)
        if adapter in self.jumplora_support:
            E = E * self.support(adapter)
        elif adapter in self.jumplora_gate:
            kept = E * (E.abs() > self.gate(adapter).log_tau.exp())
            E = torch.lerp(E, kept, self.gate(adapter).mix)
            if adapter in self.free:
                E = E * self.mask_free(adapter, torch.ones_like(E, dtype=torch.bool))
        return E.mul_(self.scaling[adapter])

    def total_update(self, adapters) -> torch.Tensor:
        """Sum of the updates of these adapters, added in this order: float32 [out, in]."""
        total = torch.zeros(self.out_features, self.in_features, device=self.jumplora_A[adapters[0]].device)
        for adapter in adapters:
            total += self.update(adapter)
        return total

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """As PEFT's method of this name: the update in the orientation of the base weight."""
        return self.update(adapter).T if self.transposed else self.update(adapter)

    # ---- merging --------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters and their ancestors to the base weight.

        The merged weight is round(W + float32 sum of the updates), a function of the original weight and the list of
        merged adapters alone: merging one by one or all at once gives the same bits. The original values of the
        changed entries are kept, so [`unmerge`] restores them exactly.

        Raises:
            ValueError: the base is quantised, or `safe_merge` found entries that are not finite.
        """
        wanted = self.closure(self.active_adapters if adapter_names is None else adapter_names)
        names = [n for n in wanted if n not in self.merged_adapters]
        if not names:
            return
        if self.quantization_backend is not None:
            raise ValueError(
                f"layer {self.layer_name} is quantised ({self.quantization_backend.backend_name}): merging would "
                "quantise the updates away. Keep the adapters live, or load the base model in bf16 or float32 and merge"
            )
        names = [*self.merged_adapters, *names]
        self.unmerge()
        delta = self.total_update(names)
        delta = delta.T if self.transposed else delta
        if safe_merge and not torch.isfinite(delta).all():
            raise ValueError(f"layer {self.layer_name}: the updates of {names} hold entries that are not finite")
        weight = self._base_weight()
        touched = delta != 0
        self._restore = (pack_bits(touched), weight[touched].clone())
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight[touched] = (weight[touched].to(wide) + delta[touched]).to(weight.dtype)
        self.merged_adapters = names

    def _base_weight(self) -> torch.Tensor:
        weight = self.get_base_layer().weight
        assert isinstance(weight, torch.Tensor)
        return weight.data

    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        if self._restore is not None:
            weight = self._base_weight()
            packed, values = (t.to(weight.device) for t in self._restore)
            weight[unpack_bits(packed, 0, weight.numel()).view_as(weight)] = values.to(weight.dtype)
        self._restore, self.merged_adapters = None, []

    def enable_adapters(self, enabled: bool) -> None:
        """Switching off takes merged updates out of the weight, switching on puts them back."""
        if not enabled and self.merged_adapters:
            self._remerge = self.merged_adapters
            self.unmerge()
        super().enable_adapters(enabled)
        if enabled and self._remerge:
            self.merge(adapter_names=self._remerge)
            self._remerge = []

    # ---- forward --------------------------------------------------------------------------------------------------

    def _past(self, names: tuple[str, ...], device: torch.device) -> tuple:
        """(crow, col, values) of the sum of finished updates [out, in]; summed once, whatever their number."""
        key = (names, device)
        if self._past_sum is None or self._past_sum[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # the sum serves training passes too
                self._past_sum = (key, to_csr(self.total_update(names)))
        return self._past_sum[1]

    def _can_fold(self, base: nn.Module, adapter: str) -> bool:
        """Whether W can be read and multiplied together with the update, instead of calling the base layer."""
        return (
            self.quantization_backend is None
            and adapter in self.jumplora_gate
            and isinstance(self.jumplora_dropout[adapter], nn.Identity)
            and type(base).forward in (nn.Linear.forward, Conv1D.forward)  # a subclass may do more than multiply
            and not (base._forward_hooks or base._forward_pre_hooks or hasattr(base, "_hf_hook"))
        )

    def _live_update(self, adapter: str, x, weight=None, bias=None):
        A, B, scaling = self.jumplora_A[adapter], self.jumplora_B[adapter], self.scaling[adapter]
        if adapter not in self.jumplora_gate:
            return (F.linear(F.linear(x.to(A.dtype), A), B) * scaling).to(x.dtype)
        gate, config = self.gate(adapter), self.configs[adapter]
        return gated_linear(
            x, weight, bias, A, B, gate.log_tau, scaling=scaling, mix=gate.mix, bandwidth=config.bandwidth,
            threshold_grad=config.threshold_grad, free=self.free.get(adapter), backend=config.backend,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        base = self.base_layer
        if self.disable_adapters:
            return base(x, *args, **kwargs)
        live = [n for n in self.closure(self.active_adapters) if n not in self.merged_adapters]
        finished = tuple(n for n in live if n in self.jumplora_support)
        y = None
        for name in live:
            if name in finished:
                continue
            if y is None and self._can_fold(base, name):
                weight = base.weight.T if self.transposed else base.weight
                y = self._live_update(name, x, weight, base.bias)
                continue
            if y is None:
                y = self._base_output(x, *args, **kwargs)
            trained = name in self.active_adapters  # parents are as they act: without dropout
            y = y + self._live_update(name, self.jumplora_dropout[name](x) if trained else x).to(y.dtype)
        if y is None:
            y = self._base_output(x, *args, **kwargs)
        if finished:
            past = sparse_linear(x.reshape(-1, self.in_features), *self._past(finished, x.device), self.out_features)
            y = y + past.view(*x.shape[:-1], self.out_features).to(y.dtype)
        return y

    def _base_output(self, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        return y if self.quantization_backend is None else self.quantization_backend.maybe_clone_base_result(y)

    def finish(self, adapter: str) -> list:
        """Record the support of a trained adapter and freeze it; returns [bytes, sha256] for its config."""
        code = encode_support(self.support(adapter))
        self.jumplora_support[adapter] = code.to(self.jumplora_A[adapter].device)
        self.free.pop(adapter, None)
        self._past_sum = None
        self._freeze(adapter)
        return [code.numel(), support_sha256(code)]

    def __repr__(self) -> str:
        return "jumplora." + super().__repr__()


class Linear(JumpLoraLayer):
    """The class that is placed: `target_modules="all-linear"` finds wrapped layers by "Linear" in its name."""

"""The tuner layer: a frozen linear layer, the update in training, and the frozen updates of the earlier tasks."""

import math

import torch
import torch.nn.functional as F
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..ops import gated_linear
from ..ops.sparse import encode_support, pack_bits, remember_support, sparse_linear, support_sha256
from .allora import RowScaledUpdate
from .config import JumpLoraConfig
from .gate import Float32ParameterDict, JumpGate
from .peft_compat import BufferDict, freeze, in_out_features, start_inactive
from .rank_routing import has_router, rank_weights, router_weights
from .updates import AdapterUpdates


class JumpLoraLayer(AdapterUpdates):
    """Wraps an `nn.Linear`, a `Conv1D` or a quantised linear layer of weight [out, in].

    Several adapters can live here; PEFT only ever sees one active. The active adapter brings its parents with it (the
    implicit stack): y = base(x) + sum over the adapter and all its ancestors of scaling * x E^T. Ancestors are frozen.
    A finished adapter has a saved support, and its update is D on that support: the threshold is not evaluated again.
    """

    allora_eta: float | None = None  # while an adapter is trained with ALLoRA
    rank_counts: torch.Tensor | None = None  # int64 [R]: the tokens that chose each rank when this was last trained
    adapter_layer_names = (
        "jumplora_A", "jumplora_B", "jumplora_g", "jumplora_router", "jumplora_router_b", "jumplora_gate",
    )  # fmt: skip
    other_param_names = ("jumplora_support", "jumplora_dropout", "configs", "scaling", "jumplora_free")

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
        in_features, out_features = in_out_features(self.get_base_layer())
        assert in_features is not None  # true of every linear layer
        assert out_features is not None
        self.in_features, self.out_features = in_features, out_features
        self.transposed = isinstance(base_layer, Conv1D)
        self.jumplora_A = Float32ParameterDict()  # adapter -> [r, in]
        self.jumplora_B = Float32ParameterDict()  # adapter -> [out, r]
        self.jumplora_g = Float32ParameterDict()  # adapter whose ranks are gated -> [r], until it is finished
        self.jumplora_router = Float32ParameterDict()  # adapter whose ranks a router chooses -> W_r [r, in]
        self.jumplora_router_b = Float32ParameterDict()  # the same -> b [r], which no optimizer moves
        self.jumplora_gate = nn.ModuleDict()
        self.jumplora_support = BufferDict(persistent=True)  # finished adapter -> uint8, coded as on disk
        self.jumplora_dropout = nn.ModuleDict()
        self.configs = {}
        self.scaling = {}
        self.jumplora_free = BufferDict(persistent=False)  # adapter under hard isolation -> packed bits
        self.frozen_peft_weight_names = {}
        start_inactive(self)

    def update_layer(self, adapter: str, config: JumpLoraConfig, r: int, alpha: float, gate: JumpGate | None) -> None:
        """Add an adapter. Raises ValueError when `r` does not fit, or it does not stand on all folded adapters."""
        self._register(adapter, config, r, alpha)
        self.jumplora_A[adapter] = nn.Parameter(torch.zeros(r, self.in_features, dtype=torch.float32))
        self.jumplora_B[adapter] = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32))
        if config.support is None:  # else the values are those of a finished task and come from its file
            nn.init.kaiming_uniform_(self.jumplora_A[adapter], a=math.sqrt(5))  # as PEFT's LoRA
            if not config.init_weights:
                nn.init.normal_(self.jumplora_B[adapter], std=1 / r)
        if has_router(config.rank_routing):
            self.route_ranks(adapter)
        if gate is not None:
            self.jumplora_gate[adapter] = gate
            if config.threshold_update != "learned":  # the schedule sets it, no optimizer may move it
                self.frozen_peft_weight_names[adapter] = ("jumplora_gate",)
        if config.support is not None:
            self.jumplora_support[adapter] = torch.zeros(config.support[self.layer_name][0], dtype=torch.uint8)
            freeze(self, adapter, self.adapter_layer_names)
        elif config.isolation == "hard":
            self.jumplora_free[adapter] = pack_bits(~self.occupied(config.parent_adapters))
        self._move_adapter_to_device_of_base_layer(adapter)
        if config.support is None:  # else it is frozen, and the others are as they were
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def add_finished(
        self,
        adapter: str,
        config: JumpLoraConfig,
        alpha: float,
        gate: JumpGate | None,
        A: torch.Tensor,
        B: torch.Tensor,
        code: torch.Tensor | None,
    ) -> None:
        """Add a finished adapter from its factors [r, in], [out, r] and its coded support; raises as `update_layer`.

        A stack has tasks x layers of them: each is put in place once, frozen, on the base's device.
        """
        self._register(adapter, config, len(A), alpha)
        device = self.base_device()
        if device is None:  # an offloaded base: its adapters stay where they are
            device = A.device
        for factors, values in ((self.jumplora_A, A), (self.jumplora_B, B)):
            factors[adapter] = nn.Parameter(values.to(device, torch.float32, copy=True), requires_grad=False)
        if gate is not None:
            gate.log_tau.requires_grad = False
            self.jumplora_gate[adapter] = gate if gate.mix.device == device else gate.to(device)
        if code is not None:
            self.jumplora_support[adapter] = code.to(device)
            self.frozen_peft_weight_names[adapter] = self.adapter_layer_names

    def _register(self, adapter: str, config: JumpLoraConfig, r: int, alpha: float) -> None:
        """What an adapter is but its tensors. Raises ValueError as `update_layer`."""
        if self.task_weights is not None:
            raise ValueError("the tasks of this model are routed: for another adapter load the stack without route=")
        if missing := self.finished.folded.keys() - set(config.parent_adapters):
            raise ValueError(f"adapter {adapter!r} must name {sorted(missing)} in parent_adapters: they are folded")
        if r < 1:
            raise ValueError(f"r = {r} of layer {self.layer_name} must be a positive integer (see `rank_pattern`)")
        if r > min(self.in_features, self.out_features):
            raise ValueError(
                f"r = {r} is larger than layer {self.layer_name} ({self.out_features} x {self.in_features}): lower r, "
                "or give this layer its own rank in `rank_pattern`"
            )
        self.jumplora_dropout[adapter] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.configs[adapter] = config
        self.scaling[adapter] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.finished.forget_past()

    def gate_ranks(self, adapter: str, g: torch.Tensor) -> None:
        """From here on the adapter's update has B diag(g) in place of B, with a trained g [r]; or B g, g [r, r]."""
        A = self.jumplora_A[adapter]
        self.jumplora_g[adapter] = nn.Parameter(g.to(A.device, torch.float32))

    def route_ranks(self, adapter: str) -> None:
        """From here on W_r [r, in] and b [r], both 0 until they are set, tell which of the adapter's ranks act."""
        A = self.jumplora_A[adapter]
        self.jumplora_router[adapter] = nn.Parameter(torch.zeros_like(A))
        self.jumplora_router_b[adapter] = nn.Parameter(A.new_zeros(len(A)))
        freeze(self, adapter, ("jumplora_router_b",))

    @torch.no_grad()
    def absorb_rank_gate(self, adapter: str, config: JumpLoraConfig) -> None:
        """B <- B diag(g) without the ranks where g = 0, or B g, at the scaling of before; at least one rank stays."""
        (A, B, _), g = self.factors(adapter), self.jumplora_g[adapter]
        open_ranks = g != 0 if g.ndim == 1 else torch.ones_like(g[0], dtype=torch.bool)
        open_ranks[0] |= not open_ranks.any()
        del self.jumplora_g[adapter]
        self.replace_factors(adapter, config, A[open_ranks].clone(), B[:, open_ranks].clone())

    @torch.no_grad()
    def replace_factors(self, adapter: str, config: JumpLoraConfig, A: torch.Tensor, B: torch.Tensor) -> None:
        """Other factors [r, in], [out, r] of any rank, at the scaling of before; raises as `update_layer`."""
        r, scaling = len(A), self.scaling[adapter]
        alpha = scaling * (math.sqrt(r) if config.use_rslora else r)
        config.rank_pattern = {**config.rank_pattern, self.layer_name: r}
        config.alpha_pattern = {**config.alpha_pattern, self.layer_name: alpha}
        self.update_layer(adapter, config, r, alpha, None)
        self.jumplora_A[adapter].copy_(A)
        self.jumplora_B[adapter].copy_(B)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's. Raises ValueError when another adapter stands on this one."""
        self.check_no_children(adapter_name)
        super().delete_adapter(adapter_name)
        self.finished.forget_past()

    def check_no_children(self, adapter: str) -> None:
        """Raise ValueError when another adapter names this one as its parent: without it, that is another update."""
        if adapter in self.finished.folded:
            return
        children = [name for name, config in self.configs.items() if adapter in config.parent_adapters]
        if children:
            raise ValueError(f"adapter {adapter!r} is a parent of {children}: delete those first")

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.finished.forget_past()  # it was summed from other values
        super()._load_from_state_dict(*args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        """Device only. PEFT would also cast to the base's dtype, and in bf16 the support would change."""
        if device is None:
            device = self.base_device()
        meta = torch.device("meta")
        if device is None:
            return
        for container in (
            self.jumplora_A, self.jumplora_B, self.jumplora_router, self.jumplora_router_b, self.jumplora_support,
            self.jumplora_free,
        ):  # fmt: skip
            if adapter_name in container and container[adapter_name].device not in (meta, device):
                container[adapter_name] = container[adapter_name].to(device)
        if adapter_name in self.jumplora_gate and self.gate(adapter_name).log_tau.device != meta:
            self.jumplora_gate[adapter_name].to(device)

    # ---- forward --------------------------------------------------------------------------------------------------

    def _add_past(self, y: torch.Tensor, x: torch.Tensor, past: tuple) -> torch.Tensor:
        if len(past) == 1:
            with torch.autocast(x.device.type, enabled=False):
                return y + F.linear(x.to(past[0].dtype), past[0]).to(y.dtype)
        added = sparse_linear(x.reshape(-1, self.in_features), *past, self.out_features)
        return y + added.view(*x.shape[:-1], self.out_features).to(y.dtype)

    def _add_weighted(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for name, rows, weight in self.task_weights.of(x, self.layer_name):
            if name in self.jumplora_support:
                own, update = x[rows], y.new_zeros(len(rows), *y.shape[1:])
                update = self._add_past(update, own, self.finished.beside((name,), x.device))
            elif name in self.configs:
                update = self._live_update(name, x[rows])
            else:
                continue
            y = y.index_add(0, rows, (update * weight).to(y.dtype))
        return y

    def _add_competing(self, y: torch.Tensor, x: torch.Tensor, live: list[str]) -> torch.Tensor:
        activations, factors = [], []
        routing = self.configs[live[-1]].rank_routing
        assert routing is not None
        with torch.autocast(x.device.type, enabled=False):  # small differences of activations choose the ranks
            for name in live:
                A, B, _ = self.factors(name)
                own = self.jumplora_dropout[name](x) if name in self.active_adapters else x
                activations.append(F.linear(own.to(A.dtype), A))
                # W x + s sum_i w_i b_i z_i; of a router W x + alpha sum_i w_i b_i z_i, and alpha = s r
                factors.append(B * (self.scaling[name] * (len(A) if has_router(routing) else 1)))
            z, k = torch.cat(activations, -1), int(routing["k"])
            if has_router(routing):
                router = torch.cat([self.jumplora_router[name] for name in live])
                b = torch.cat([self.jumplora_router_b[name] for name in live])
                weights = router_weights(F.linear(x.to(router.dtype), router), b, k)
                if self.training:
                    self.rank_counts = (weights > 0).reshape(-1, weights.shape[-1]).sum(0)
            else:
                weights = rank_weights(z, k, routing["tau"], 0.0 if self.training else routing["delta"])
            return y + F.linear(weights * z, torch.cat(factors, 1)).to(y.dtype)

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
        (A, B, free), scaling = self.factors(adapter), self.scaling[adapter]
        if adapter not in self.jumplora_gate:
            if self.allora_eta is not None and A.requires_grad:
                with torch.autocast(x.device.type, enabled=False):
                    return RowScaledUpdate.apply(x.to(A.dtype), A, B, scaling, self.allora_eta).to(x.dtype)
            return (F.linear(F.linear(x.to(A.dtype), A), B) * scaling).to(x.dtype)
        gate, config = self.gate(adapter), self.configs[adapter]
        # A number where it is known to be 0: plain LoRA. Under torch.compile a tensor, which compiles once.
        mix = 0.0 if not torch.compiler.is_compiling() and gate.f == 0 else gate.mix
        return gated_linear(
            x, weight, bias, A, B, gate.log_tau, scaling=scaling, mix=mix, bandwidth=config.bandwidth,
            threshold_grad=config.threshold_grad, free=free, backend=config.backend,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        base = self.base_layer
        if self.disable_adapters:
            return base(x, *args, **kwargs)
        if self.task_weights is not None:
            return self._add_weighted(self._base_output(x, *args, **kwargs), x)
        live = self.closure(self.active_adapters, without=self.merged_adapters)
        routings = [self.configs[name].rank_routing if name in self.configs else None for name in live]
        if any(routings):
            if any(routing != routings[0] for routing in routings):
                raise ValueError(
                    f"{live}: the ranks of some tasks compete for each token, those of others do not, or in another way"
                )
            return self._add_competing(self._base_output(x, *args, **kwargs), x, live)
        finished = tuple(n for n in live if n in self.finished.folded or n in self.jumplora_support)
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
            y = self._add_past(y, x, self.finished.beside(finished, x.device))
        return y

    def _base_output(self, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        return y if self.quantization_backend is None else self.quantization_backend.maybe_clone_base_result(y)

    def finish(self, adapter: str) -> list:
        """Record the support of a trained adapter and freeze it; returns [bytes, sha256] for its config."""
        mask = self.support(adapter)
        code = encode_support(mask)
        self.jumplora_support[adapter] = code.to(self.jumplora_A[adapter].device)
        remember_support(self.jumplora_support[adapter], mask)
        if adapter in self.jumplora_free:
            del self.jumplora_free[adapter]
        self.finished.forget_past()
        freeze(self, adapter, self.adapter_layer_names)
        return [code.numel(), support_sha256(code)]

    def __repr__(self) -> str:
        return "jumplora." + super().__repr__()


class Linear(JumpLoraLayer):
    """The class that is placed: `target_modules="all-linear"` finds wrapped layers by "Linear" in its name."""

"""What single adapters add to a layer, and the stack that an adapter brings with it."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..ops.sparse import add_at, support_index, support_sha256, unpack_bits
from .config import JumpLoraConfig
from .finished import FinishedUpdates
from .gate import Float32ParameterDict, JumpGate
from .peft_compat import BufferDict, base_device, check_adapters_to_merge
from .rank_routing import refuse_competing


class AdapterUpdates(nn.Module, BaseTunerLayer):
    """The part of a [`JumpLoraLayer`] that knows its adapters' updates; `finished` adds up those of finished ones."""

    layer_name: str
    in_features: int
    out_features: int
    transposed: bool  # the base weight is [in, out]
    jumplora_A: Float32ParameterDict
    jumplora_B: Float32ParameterDict
    jumplora_g: Float32ParameterDict
    jumplora_router: Float32ParameterDict
    jumplora_router_b: Float32ParameterDict
    jumplora_gate: nn.ModuleDict
    jumplora_support: BufferDict
    configs: dict[str, JumpLoraConfig]
    scaling: dict[str, float]
    jumplora_free: BufferDict
    quantization_backend: Any
    task_weights: Any = None  # TaskWeights, shared by all layers, where tasks act row by row

    def __init__(self):
        super().__init__()
        self.finished = FinishedUpdates(self)

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]  # PEFT asks for it by this name
        """The adapters in the base weight, in the order in which they are added."""
        return self.finished.merged

    def base_device(self) -> torch.device | None:
        """The device of the base weight; None if it cannot be told, or the weight is offloaded (on "meta")."""
        device = base_device(self)
        return None if device is not None and device.type == "meta" else device

    def offloaded(self) -> bool:
        """Whether accelerate keeps the base weight elsewhere (device_map with "disk", or "cpu" beside a GPU)."""
        weight = getattr(self.get_base_layer(), "weight", None)
        return isinstance(weight, torch.Tensor) and weight.is_meta

    def gate(self, adapter: str) -> JumpGate:
        """The gate of an adapter, shared with the other layers of its scope."""
        gate = self.jumplora_gate[adapter]
        assert isinstance(gate, JumpGate)
        return gate

    # ---- what an adapter adds -------------------------------------------------------------------------------------

    def closure(self, adapters, without=()) -> list[str]:
        """These adapters and all their ancestors on this layer, ancestors first, each once; folded ones before all.

        Adapters in `without` are left out together with their ancestors.
        """
        order: dict[str, None] = {}
        seen = set(without)

        def visit(names) -> bool:
            reached = False
            for name in [n for n in names if n not in seen]:
                seen.add(name)
                if name in self.finished.folded:
                    reached = True
                elif name in self.configs:
                    reached |= visit(self.configs[name].parent_adapters)
                    order[name] = None
            return reached

        folded = [n for n in self.finished.folded if n not in without] if visit(adapters) else []
        return [*folded, *order]

    def _own(self, adapter: str) -> None:
        """Raise ValueError when an adapter has been folded."""
        if adapter in self.finished.folded:
            raise ValueError(
                f"{adapter!r} is folded: layer {self.layer_name} keeps the sum of the earlier tasks, not their factors "
                "and supports. They are in the stack's files; a strategy that reads them requires 'past_factors'"
            )

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(A [r, in], B [out, r], packed bits of the entries it may use or None), B with what `gate_ranks` put
        between it and A. Raises ValueError if folded."""
        self._own(adapter)
        B = self.jumplora_B[adapter]
        if adapter in self.jumplora_g:
            g = self.jumplora_g[adapter]
            B = B * g if g.ndim == 1 else B @ g
        return self.jumplora_A[adapter], B, self.free(adapter)

    def free(self, adapter: str) -> torch.Tensor | None:
        """Packed bits of the entries that an adapter under hard isolation may use; None for all."""
        if adapter not in self.jumplora_free:
            return None
        return self.jumplora_free[adapter]

    def product(self, adapter: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """D = B A without gradient, into `out` or a new tensor: [out, in], float32 under autocast too.

        Raises:
            ValueError: the adapter is folded.
        """
        A, B, _ = self.factors(adapter)
        if out is None:
            out = torch.empty(self.out_features, self.in_features, dtype=A.dtype, device=A.device)
        return torch.mm(B.detach(), A.detach(), out=out)  # with an out=, autocast leaves it alone

    def support(self, adapter: str) -> torch.Tensor:
        """Which entries the update keeps: bool [out, in]. Of a finished adapter: the saved ones, checked.

        Raises:
            ValueError: the saved support is not the one whose sha256 the adapter's config names, or is folded.
        """
        if adapter in self.jumplora_support:
            index = self._saved_index(adapter).to(self.jumplora_support[adapter].device)
            mask = torch.zeros(self.out_features, self.in_features, dtype=torch.bool, device=index.device)
            mask.view(-1)[index] = True
            return mask
        D = self.product(adapter)
        if adapter not in self.jumplora_gate:
            return torch.ones_like(D, dtype=torch.bool)
        kept, free = D.abs() > self.gate(adapter).log_tau.detach().exp(), self.free_mask(adapter)
        return kept if free is None else kept & free

    def _saved_index(self, adapter: str) -> torch.Tensor:
        """Flat indices of the entries that a finished adapter keeps, int64 [kept]; errors as [`support`]."""
        code, entry = self.jumplora_support[adapter], self.configs[adapter].support
        expected = entry[self.layer_name][1] if entry else None
        found = support_sha256(code)
        if found != expected:
            raise ValueError(
                f"adapter {adapter!r}, layer {self.layer_name}: the saved support has sha256 {found}, its config "
                f"says {expected}; the file is damaged or belongs to another adapter"
            )
        return support_index(code, (self.out_features, self.in_features))

    def free_mask(self, adapter: str) -> torch.Tensor | None:
        """Entries that hard isolation leaves to this adapter: bool [out, in]; None for all."""
        if (bits := self.free(adapter)) is None:
            return None
        return unpack_bits(bits, 0, self.out_features * self.in_features).view(self.out_features, self.in_features)

    def occupied(self, adapters) -> torch.Tensor:
        """Union of the supports of finished adapters and their ancestors: bool [out, in], on the CPU."""
        union = torch.zeros(self.out_features, self.in_features, dtype=torch.bool)
        for name in self.closure(adapters):
            if not self.finished.folded.get(name, name in self.jumplora_support):
                raise ValueError(
                    f"isolation='hard' needs parents with a saved support, and {name!r} has none: finish it first "
                    "(`finish_adapter`), or use parents trained with a gate"
                )
            if name not in self.finished.folded:
                union |= self.support(name).cpu()
        if self.finished.bits is not None:  # every adapter stands on all folded ones
            union |= unpack_bits(self.finished.bits, 0, union.numel()).view_as(union)
        return union

    @torch.no_grad()
    def update(self, adapter: str) -> torch.Tensor:
        """scaling * E as it acts now: float32 [out, in], without gradient. Raises ValueError if folded, or if its ranks
        compete with those of other tasks."""
        if adapter in self.configs:
            refuse_competing(self.configs[adapter].rank_routing, "merging, folding, switching or adding them up")
        if adapter in self.jumplora_support:
            kept = self.jumplora_A[adapter].new_zeros(self.out_features, self.in_features)
            self.add_updates(kept, [adapter])
            return kept
        E = self.product(adapter)
        if adapter in self.jumplora_gate:
            kept = E * (E.abs() > self.gate(adapter).log_tau.exp())
            E = torch.lerp(E, kept, self.gate(adapter).mix)
            if (free := self.free_mask(adapter)) is not None:
                E = E * free
        return E.mul_(self.scaling[adapter])

    def add_updates(self, total: torch.Tensor, adapters: list[str]) -> None:
        """Add updates to a float32 [out, in] in this order; those of finished adapters at their supports alone."""
        room = None  # one product for all: to have a new one from the system costs as much as to compute it
        for adapter in adapters:
            if adapter in self.jumplora_support:
                room = self.product(adapter, out=room)
                add_at(total, room, self._saved_index(adapter), self.scaling[adapter])
            else:
                total += self.update(adapter).to(total.device)

    def total_update(self, adapters) -> torch.Tensor:
        """Sum of the updates of these adapters, as [`FinishedUpdates.total`]: a new float32 [out, in]."""
        return self.finished.total(adapters)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """As PEFT's method of this name: the update in the orientation of the base weight."""
        return self.update(adapter).T if self.transposed else self.update(adapter)

    # ---- PEFT's verbs ---------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (None: the active ones) and their ancestors to the base weight, see [`FinishedUpdates.merge`].

        Warns as PEFT does when some or all of them are merged already.
        """
        names = check_adapters_to_merge(self, adapter_names)
        self.finished.merge(names, safe_merge)

    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        self.finished.unmerge()

    def enable_adapters(self, enabled: bool) -> None:
        """Switching off takes merged updates out of the weight, switching on puts them back."""
        if not enabled:
            self.finished.disable()
        super().enable_adapters(enabled)
        if enabled:
            self.finished.enable()

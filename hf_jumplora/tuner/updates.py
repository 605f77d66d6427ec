"""What adapters add to a layer: one update, the sum of many, the merged weight, earlier tasks as their sum alone."""

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..ops.sparse import add_at, decode_index, pack_bits, support_sha256, unpack_bits
from .config import JumpLoraConfig
from .gate import Float32ParameterDict, JumpGate
from .sharded_parameters import piece, piece_of


class AdapterUpdates(nn.Module, BaseTunerLayer):
    """The part of a [`JumpLoraLayer`] that knows its adapters' updates and adds them up.

    `fold` turns finished adapters into one float32 sum [out, in] and one bit per entry (kept by any of them), so that
    the cost of a layer does not depend on their number. Folded adapters keep their names: as parents, and among the
    merged ones. All adapters of the layer stand on all folded ones.
    """

    layer_name: str
    in_features: int
    out_features: int
    transposed: bool  # the base weight is [in, out]
    jumplora_A: Float32ParameterDict
    jumplora_B: Float32ParameterDict
    jumplora_gate: nn.ModuleDict
    jumplora_support: BufferDict
    configs: dict[str, JumpLoraConfig]
    scaling: dict[str, float]
    jumplora_free: BufferDict

    def __init__(self):
        super().__init__()
        self.merged_adapters: list[str] = []
        self.folded: dict[str, bool] = {}  # name -> it has a support; in the order of the tasks
        # Three tensors on the CPU, whatever the number of tasks. The first two exist once something is folded.
        self._folded_sum: torch.Tensor | None = None  # float32 [out, in]
        self._folded_bits: torch.Tensor | None = None  # union of the folded supports, packed
        self._original: torch.Tensor | None = None  # the base weight as it was before merging
        self._remerge: list[str] = []
        self._past_sum: tuple | None = None

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
                if name in self.folded:
                    reached = True
                elif name in self.configs:
                    reached |= visit(self.configs[name].parent_adapters)
                    order[name] = None
            return reached

        folded = [n for n in self.folded if n not in without] if visit(adapters) else []
        return [*folded, *order]

    def _own(self, adapter: str) -> None:
        """Raise ValueError when an adapter has been folded."""
        if adapter in self.folded:
            raise ValueError(
                f"{adapter!r} is folded: layer {self.layer_name} keeps the sum of the earlier tasks, not their factors "
                "and supports. They are in the stack's files; a strategy that reads them requires 'past_factors'"
            )

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(A [r, in], B [out, r], packed bits of the entries it may use or None). Raises ValueError if folded."""
        self._own(adapter)
        return self.jumplora_A[adapter], self.jumplora_B[adapter], self.free(adapter)

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
        return self.mask_free(adapter, D.abs() > self.gate(adapter).log_tau.detach().exp())

    def _saved_index(self, adapter: str) -> torch.Tensor:
        """Flat indices of the entries that a finished adapter keeps, int64 [kept] on the CPU; errors as [`support`]."""
        code, entry = self.jumplora_support[adapter], self.configs[adapter].support
        expected = entry[self.layer_name][1] if entry else None
        found = support_sha256(code)
        if found != expected:
            raise ValueError(
                f"adapter {adapter!r}, layer {self.layer_name}: the saved support has sha256 {found}, its config "
                f"says {expected}; the file is damaged or belongs to another adapter"
            )
        return decode_index(code, (self.out_features, self.in_features))

    def mask_free(self, adapter: str, mask: torch.Tensor) -> torch.Tensor:
        """`mask` [out, in] without the entries that hard isolation closes to this adapter."""
        if adapter not in self.jumplora_free:
            return mask
        return mask & unpack_bits(self.jumplora_free[adapter], 0, mask.numel()).view_as(mask)

    def occupied(self, adapters) -> torch.Tensor:
        """Union of the supports of finished adapters and their ancestors: bool [out, in], on the CPU."""
        union = torch.zeros(self.out_features, self.in_features, dtype=torch.bool)
        for name in self.closure(adapters):
            if not self.folded.get(name, name in self.jumplora_support):
                raise ValueError(
                    f"isolation='hard' needs parents with a saved support, and {name!r} has none: finish it first "
                    "(`finish_adapter`), or use parents trained with a gate"
                )
            if name not in self.folded:
                union |= self.support(name).cpu()
        if self._folded_bits is not None:  # every adapter stands on all folded ones
            union |= unpack_bits(self._folded_bits, 0, union.numel()).view_as(union)
        return union

    @torch.no_grad()
    def update(self, adapter: str) -> torch.Tensor:
        """scaling * E as it acts now: float32 [out, in], without gradient. Raises ValueError if folded."""
        if adapter in self.jumplora_support:
            kept = torch.zeros(self.out_features, self.in_features, device=self.jumplora_A[adapter].device)
            self._add_updates(kept, [adapter])
            return kept
        E = self.product(adapter)
        if adapter in self.jumplora_gate:
            kept = E * (E.abs() > self.gate(adapter).log_tau.exp())
            E = torch.lerp(E, kept, self.gate(adapter).mix)
            if adapter in self.jumplora_free:
                E = E * self.mask_free(adapter, torch.ones_like(E, dtype=torch.bool))
        return E.mul_(self.scaling[adapter])

    def _add_updates(self, total: torch.Tensor, adapters: list[str]) -> None:
        """Add updates to a float32 [out, in] in this order; those of finished adapters at their supports alone."""
        room = None  # one product for all: to have a new one from the system costs as much as to compute it
        for adapter in adapters:
            if adapter in self.jumplora_support:
                room = self.product(adapter, out=room)
                add_at(total, room, self._saved_index(adapter), self.scaling[adapter])
            else:
                total += self.update(adapter).to(total.device)

    def total_update(self, adapters) -> torch.Tensor:
        """Sum of the updates of these adapters, added in this order (folded ones first): a new float32 [out, in].

        Raises:
            ValueError: some of the folded adapters are among `adapters` and others are not.
        """
        names = list(adapters)
        missing = self.folded.keys() - set(names)
        if missing and len(missing) < len(self.folded):
            raise ValueError(
                f"layer {self.layer_name}: {sorted(missing)} are folded into one sum with others of {names}"
            )
        device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0] or torch.device("cpu")
        if self._folded_sum is not None and not missing:
            total = self._folded_sum.to(device, copy=True)
        else:
            total = torch.zeros(self.out_features, self.in_features, device=device)
        self._add_updates(total, [name for name in names if name not in self.folded])
        return total

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """As PEFT's method of this name: the update in the orientation of the base weight."""
        return self.update(adapter).T if self.transposed else self.update(adapter)

    # ---- merging --------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters and their ancestors to the base weight.

        The merged weight is round(W + float32 sum of the updates), a function of the original weight and the list of
        merged adapters alone: merging one by one, all at once, or some of them folded gives the same bits. The
        original weight is kept on the CPU, so [`unmerge`] restores it exactly.

        Raises:
            ValueError: the base is quantised, or `safe_merge` found entries that are not finite.
        """
        wanted = self.closure(self.active_adapters if adapter_names is None else adapter_names)
        names = [n for n in wanted if n not in self.merged_adapters]
        if not names:
            return
        self.check_mergeable()
        names = [*self.merged_adapters, *names]
        delta = self.total_update(names)
        if safe_merge and not torch.isfinite(delta).all():
            raise ValueError(f"layer {self.layer_name}: the updates of {names} hold entries that are not finite")
        # Where the weight is spread over processes, each changes the piece it holds.
        weight = self._base_weight()
        if self._original is None:
            self._original = weight.to("cpu", copy=True)
        original = self._original.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        delta = piece_of(delta.T if self.transposed else delta, self.get_base_layer().weight)
        weight.copy_(original + delta.to(weight.device))
        self.merged_adapters = names

    def check_mergeable(self) -> None:
        """Raise ValueError, saying what to do instead, when the base is quantised."""
        if self.quantization_backend is not None:
            raise ValueError(
                f"layer {self.layer_name} is quantised ({self.quantization_backend.backend_name}): merging would "
                "quantise the updates away. Keep the adapters live, or load the base model in bf16 or float32 and "
                "merge there (load_stack(..., dtype='bfloat16', merge=True), without quantization_config)"
            )

    def _base_weight(self) -> torch.Tensor:
        return piece(self.get_base_layer().weight)

    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        if self._original is not None:
            self._base_weight().copy_(self._original)
        self._original, self.merged_adapters = None, []

    def enable_adapters(self, enabled: bool) -> None:
        """Switching off takes merged updates out of the weight, switching on puts them back."""
        if not enabled and self.merged_adapters:
            self._remerge = self.merged_adapters
            self.unmerge()
        super().enable_adapters(enabled)
        if enabled and self._remerge:
            self.merge(adapter_names=self._remerge)
            self._remerge = []

    # ---- folding --------------------------------------------------------------------------------------------------

    def fold(self, adapters) -> None:
        """Add finished adapters and their ancestors to the sum of the folded ones; the caller deletes them after it.

        Raises:
            ValueError: one of them is not finished, or another adapter of this layer does not stand on all of them.
        """
        names = [n for n in self.closure(adapters) if n not in self.folded]
        for name, config in self.configs.items():
            if name in names and not config.inference_mode:
                raise ValueError(f"adapter {name!r} is not finished: only finished adapters can be folded")
            if name not in names and (missing := set(names) - set(self.closure([name]))):
                raise ValueError(f"{sorted(missing)} cannot be folded: adapter {name!r} does not stand on them")
        for name in names:
            if self._folded_sum is None:
                self._folded_sum = torch.zeros(self.out_features, self.in_features)
            self._add_updates(self._folded_sum, [name])
            if name in self.jumplora_support:
                bits = pack_bits(self.support(name)).cpu()
                self._folded_bits = bits if self._folded_bits is None else self._folded_bits | bits
            self.folded[name] = name in self.jumplora_support
        self._past_sum = None

"""The finished updates of one layer: as their sum, merged into the base weight, or as one product beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..ops.sparse import pack_bits, to_csr
from .config import JumpLoraConfig
from .sharded_parameters import piece, piece_of


class Updates(Protocol):
    """What a layer knows of its adapters' single updates ([`AdapterUpdates`])."""

    layer_name: str
    in_features: int
    out_features: int
    transposed: bool
    configs: dict[str, JumpLoraConfig]
    quantization_backend: Any
    jumplora_support: Any
    task_weights: Any

    def get_base_layer(self) -> nn.Module: ...
    def base_device(self) -> torch.device | None: ...
    def offloaded(self) -> bool: ...
    def closure(self, adapters: Any, without: Any = ()) -> list[str]: ...
    def support(self, adapter: str) -> torch.Tensor: ...
    def add_updates(self, total: torch.Tensor, adapters: list[str]) -> None: ...
    def get_delta_weight(self, adapter: str) -> torch.Tensor: ...


@dataclass
class Touched:
    """The entries that any task changes (flat indices [n] into the base weight as it is stored), their values in the
    base [n], and for each adapter where its entries stand in that list [k] and what it adds [k]."""

    index: torch.Tensor
    original: torch.Tensor
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]]


class FinishedUpdates:
    """The only object that adds finished updates to a layer and changes its base weight.

    Folded adapters are kept as one float32 sum [out, in] and one bit per entry (kept by any of them), so that the cost
    of a layer does not depend on their number. They keep their names: as parents, and among the merged ones. All
    adapters of the layer stand on all folded ones.

    The merged weight is round(W + float32 sum of the updates), a function of the original weight and the list of merged
    adapters alone: merging one by one, all at once, or some of them folded gives the same bits. The original weight is
    kept on the CPU, so that unmerging restores it exactly.

    Attributes:
        folded: folded adapter -> whether it has a support; in the order of the tasks.
        merged: the adapters in the base weight, in the order in which they are added.
        sum: float32 [out, in], the updates of the folded adapters; None without any.
        bits: union of the folded supports, packed; None without any.
        original: the base weight before merging; None while nothing is merged.
    """

    def __init__(self, layer: Updates):
        self.layer = layer
        self.folded: dict[str, bool] = {}
        self.merged: list[str] = []
        # Three tensors on the CPU, whatever the number of tasks.
        self.sum: torch.Tensor | None = None
        self.bits: torch.Tensor | None = None
        self.original: torch.Tensor | None = None
        self.past: dict[Any, tuple[torch.Tensor, ...]] = {}  # one entry; with tasks weighted row by row one a task
        self._disabled: list[str] = []
        self._touched: Touched | None = None

    def forget_past(self) -> None:
        """An adapter was added, removed, finished or loaded: the sum beside the weight is made again."""
        self.past = {}

    def rename(self, old: str, new: str) -> None:
        """A merged adapter has another name from now on."""
        self.merged = [new if name == old else name for name in self.merged]

    # ---- their sum ------------------------------------------------------------------------------------------------

    def total(self, adapters: Sequence[str]) -> torch.Tensor:
        """Sum of the updates of these adapters, added in this order (folded ones first): a new float32 [out, in].

        Raises:
            ValueError: some of the folded adapters are among `adapters` and others are not.
        """
        layer, names = self.layer, list(adapters)
        missing = self.folded.keys() - set(names)
        if missing and len(missing) < len(self.folded):
            raise ValueError(
                f"layer {layer.layer_name}: {sorted(missing)} are folded into one sum with others of {names}"
            )
        device = layer.base_device() or torch.device("cpu")
        if self.sum is not None and not missing:
            total = self.sum.to(device, copy=True)
        else:
            total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float32, device=device)
        layer.add_updates(total, [name for name in names if name not in self.folded])
        return total

    def beside(self, adapters: tuple[str, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
        """The sum of finished updates [out, in], made once, whatever their number: (crow, col, values), or (dense,).

        On a CPU the sparse product is slower than the dense one from about 4 % of the entries on (1024 x 1024 and
        4096 x 4096, float32). Elsewhere memory decides: 8 bytes per non-zero entry against 4 bytes per entry.
        """
        key = (adapters, device)
        if key not in self.past:
            if self.layer.task_weights is None:
                self.past.clear()
            with torch.inference_mode(False), torch.no_grad():  # the sum serves training passes too
                total = self.total(adapters).to(device)
                at_most = 1 / 25 if device.type == "cpu" else 1 / 2
                sparse = int(total.count_nonzero()) < at_most * total.numel() < 2**31
                self.past[key] = _narrow(to_csr(total)) if sparse else (total,)
        return self.past[key]

    def fold(self, adapters: Sequence[str]) -> None:
        """Add finished adapters and their ancestors to the sum of the folded ones; the caller deletes them after it.

        Raises:
            ValueError: one of them is not finished, or another adapter of this layer does not stand on all of them.
        """
        layer = self.layer
        names = [n for n in layer.closure(adapters) if n not in self.folded]
        for name, config in layer.configs.items():
            if name in names and not config.inference_mode:
                raise ValueError(f"adapter {name!r} is not finished: only finished adapters can be folded")
            if name not in names and (missing := set(names) - set(layer.closure([name]))):
                raise ValueError(f"{sorted(missing)} cannot be folded: adapter {name!r} does not stand on them")
        for name in names:
            if self.sum is None:
                self.sum = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float32)
            layer.add_updates(self.sum, [name])
            if name in layer.jumplora_support:
                bits = pack_bits(layer.support(name)).cpu()
                self.bits = bits if self.bits is None else self.bits | bits
            self.folded[name] = name in layer.jumplora_support
        self.forget_past()

    # ---- in the base weight ---------------------------------------------------------------------------------------

    def check_mergeable(self) -> None:
        """Raise ValueError, saying what to do instead, when the base is quantised or offloaded, or tasks are routed."""
        if self.layer.task_weights is not None:
            raise ValueError(
                "the tasks of this model are routed: each prompt has weights of its own, and no one weight is the sum. "
                "To merge, load the stack without route="
            )
        if self.layer.quantization_backend is not None:
            raise ValueError(
                f"layer {self.layer.layer_name} is quantised ({self.layer.quantization_backend.backend_name}): merging "
                "would quantise the updates away. Keep the adapters live, or load the base model in bf16 or float32 "
                "and merge there (load_stack(..., dtype='bfloat16', merge=True), without quantization_config)"
            )
        if self.layer.offloaded():
            raise ValueError(
                f"the weight of layer {self.layer.layer_name} is not in memory (device_map has offloaded it): keep the "
                "adapters live, load without device_map, or merge on disk (hf-jumplora merge)"
            )

    def merge(self, adapters: Sequence[str], safe: bool = False) -> None:
        """Add adapters and their ancestors to the base weight, those that are in it already left out.

        Raises:
            ValueError: the base is quantised, or with `safe` the merged weight has entries that are not finite.
        """
        names = [n for n in self.layer.closure(adapters) if n not in self.merged]
        if not names:
            return
        self.check_mergeable()
        names = [*self.merged, *names]
        delta = self.total(names)
        # Where the weight is spread over processes, each changes the piece it holds.
        weight = self._weight()
        kept = weight.to("cpu", copy=True) if self.original is None else self.original
        delta = piece_of(delta.T if self.layer.transposed else delta, self._parameter())
        wide = kept.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        merged = wide + delta.to(weight.device)
        if safe and not torch.isfinite(merged.to(weight.dtype)).all():  # float16 overflows where float32 does not
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken: with the updates of "
                f"{names} layer {self.layer.layer_name} has entries that are not finite in {weight.dtype}. Nothing was "
                "merged"
            )
        weight.copy_(merged)
        self.original, self.merged = kept, names

    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        if self.original is not None:
            self._weight().copy_(self.original)
        self.original, self.merged = None, []

    def disable(self) -> None:
        """Take merged updates out of the weight, until [`enable`]."""
        if self.merged:
            self._disabled = self.merged
            self.unmerge()

    def enable(self) -> None:
        """Put back what [`disable`] has taken out."""
        if self._disabled:
            self.merge(self._disabled)
            self._disabled = []

    # ---- changed in place -----------------------------------------------------------------------------------------

    def prepare_switch(self, adapters: Sequence[str]) -> None:
        """Compute every adapter's sparse update once, and keep it beside the weight (16 bytes per entry of a task).

        Raises:
            ValueError: the weight was moved or cast since.
        """
        if self._touched is None:
            self._touched = self._touch([name for name in adapters if name in self.layer.configs])
        weight, touched = self._weight(), self._touched
        if touched.index.device != weight.device or touched.original.dtype != weight.dtype:
            raise ValueError(
                f"layer {self.layer.layer_name} is now {weight.dtype} on {weight.device}, and was "
                f"{touched.original.dtype} on {touched.index.device} when its tasks were first switched: move or cast "
                "a model before that"
            )

    def begin_switch(self) -> None:
        """Call nothing merged, so that PEFT does not unmerge; [`switch`] writes every entry that is merged."""
        self.merged = []

    def switch(self, adapters: Sequence[str]) -> None:
        """Make the base weight the one with exactly these adapters merged, by writing the touched entries alone.

        After [`prepare_switch`] and [`begin_switch`]. The same bits as merging them into the original weight.
        """
        assert self._touched is not None
        touched, weight = self._touched, self._weight()
        if self.original is None:  # unmerged: before, or when the updates were computed
            self.original = weight.to("cpu", copy=True)
        total = torch.zeros(touched.index.numel(), dtype=torch.float32, device=weight.device)
        names = [name for name in adapters if name in self.layer.configs]
        for name in names:
            place, values = touched.updates[name]
            total[place] += values
        wide = torch.promote_types(weight.dtype, torch.float32)
        new = (touched.original.to(wide) + total).to(weight.dtype)
        weight.put_(touched.index, torch.where(total != 0, new, touched.original))
        self.merged = names

    def _touch(self, adapters: list[str]) -> Touched:
        self.unmerge()
        weight = self._weight()
        sparse = {}
        union = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        for adapter in adapters:
            update = self.layer.get_delta_weight(adapter).reshape(-1)
            index = update.nonzero().view(-1)
            union[index] = True
            sparse[adapter] = (index, update[index])
        index = union.nonzero().view(-1)
        place = torch.empty(weight.numel(), dtype=torch.int32, device=weight.device)
        place[index] = torch.arange(index.numel(), dtype=torch.int32, device=weight.device)
        updates = {adapter: (place[where].long(), values) for adapter, (where, values) in sparse.items()}
        return Touched(index, weight.take(index), updates)

    def _parameter(self) -> Any:
        return self.layer.get_base_layer().weight

    def _weight(self) -> torch.Tensor:
        return piece(self._parameter())


def _narrow(csr: tuple) -> tuple:
    """(crow, col, values) with 32-bit indices: less memory, and the product is faster on a CPU."""
    return csr[0].int(), csr[1].int(), csr[2]

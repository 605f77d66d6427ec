"""Density and threshold between the exact start and the exact end of a task: from a sample, without waiting.

An exact quantile looks at every entry of every layer and waits for the device many times. To hold a density that Adam's
small steps disturb, a sample does: of n entries, a density d is right to sqrt(d (1 - d) / n), which is 0.09 % of all
entries at d = 30 % and n = 2^18.
"""

import math
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import nn

from ..ops.sparse import unpack_bits
from .config import JumpLoraConfig, of_layer
from .gate import JumpGate
from .layer import JumpLoraLayer
from .lookup import gate_groups
from .sharded_parameters import assign, full_shape, gathered, whole


ENTRIES = 1 << 18  # of all layers together
AT_LEAST = 1 << 14  # of each gate
FLOATS = 1 << 25  # entries times rank: what is gathered of A and B


def share_to_keep(config: JumpLoraConfig, layers: list[JumpLoraLayer], adapter: str, density: float | None) -> float:
    """The fraction that a gate over `layers` keeps: its own in `density_pattern` (one gate per layer), or `density`.

    None keeps as many entries as A and B have parameters, which is the published start (for the global scope the
    published code takes the next larger entry, keeping one fewer).
    """
    share = of_layer(config.density_pattern, layers[0].layer_name, density)
    if share is not None:
        return share
    parameters = sum(math.prod(full_shape(factor)) for layer in layers for factor in layer.factors(adapter)[:2])
    return (parameters - (config.threshold_scope == "global")) / entries(layers)


class _Part(NamedTuple):
    """The sampled entries of the layers of one gate that have the same shapes; indices into their stacked factors."""

    gate: int
    layers: list[JumpLoraLayer]
    rows: torch.Tensor  # into [layers * out, r]
    columns: torch.Tensor  # into [layers * in, r]
    free: torch.Tensor | None  # 0.0 where hard isolation closes the entry


class DensitySample:
    """A fixed sample of the entries of an adapter's updates: the same in all processes and after a restart.

    Spread over the layers of each gate by their size, one entry out of each of as many equal pieces of a layer; all
    entries of a model that has no more. Nothing here waits for the device.
    """

    def __init__(self, model: nn.Module, adapter: str):
        self.adapter = adapter
        self.gates: list[tuple[JumpGate, list[JumpLoraLayer]]] = gate_groups(model, adapter)
        self._parts = list(self._sample())
        self._sizes = [entries(layers) for _, layers in self.gates]

    def _sample(self):
        generator = torch.Generator().manual_seed(0)
        everything = sum(entries(layers) for _, layers in self.gates)
        for number, (_, layers) in enumerate(self.gates):
            size, rank = entries(layers), max(full_shape(layer.factors(self.adapter)[0])[0] for layer in layers)
            wanted = min(max(ENTRIES * size // everything, AT_LEAST), FLOATS // rank)
            parts = defaultdict(list)
            for layer in layers:
                A, B, free = layer.factors(self.adapter)
                own = layer.out_features * layer.in_features
                count = own if wanted >= size else math.ceil(wanted * own / size)
                index = torch.arange(count, dtype=torch.float64)
                if count < own:
                    index = (index + torch.rand(count, generator=generator, dtype=torch.float64)) * (own / count)
                index = index.long().clamp_(max=own - 1)
                if free is not None:
                    free = unpack_bits(free.cpu(), 0, own)[index].float()
                parts[full_shape(A), full_shape(B), A.device, free is None].append((layer, index, free))
            for (_, _, device, _), found in parts.items():
                some, indices, masks = zip(*found, strict=True)
                width, height = some[0].in_features, some[0].out_features
                rows = torch.cat([i // width + n * height for n, i in enumerate(indices)])
                columns = torch.cat([i % width + n * width for n, i in enumerate(indices)])
                mask = None if masks[0] is None else torch.cat(masks).to(device)
                yield _Part(number, list(some), rows.to(device), columns.to(device), mask)

    @torch.no_grad()
    def _magnitudes(self) -> list[torch.Tensor]:
        """|D| at the sampled entries of each gate, in one tensor each."""
        found: list[list[torch.Tensor]] = [[] for _ in self.gates]
        factors = [layer.factors(self.adapter) for part in self._parts for layer in part.layers]
        with gathered(factor for A, B, _ in factors for factor in (A, B)):
            for gate, layers, rows, columns, free in self._parts:
                A, B = (torch.stack([layer.factors(self.adapter)[side] for layer in layers]) for side in (0, 1))
                left, right = B.flatten(0, 1)[rows], A.mT.flatten(0, 1)[columns]
                magnitude = (left * right).sum(-1).abs_()
                found[gate].append(magnitude if free is None else magnitude.mul_(free))
        return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in found]

    @torch.no_grad()
    def hold(self, config: JumpLoraConfig, density: float | None) -> None:
        """Set tau of every gate so that [`share_to_keep`] of the sampled entries are kept."""
        around = []  # the largest that goes and the smallest that stays, of each gate
        for (_, layers), magnitudes in zip(self.gates, self._magnitudes(), strict=True):
            count = len(magnitudes)
            k = min(max(1, count - round(share_to_keep(config, layers, self.adapter, density) * count)), count)
            above = min(k + 1, count)
            if magnitudes.is_cuda:  # there one block of threads selects, and all of them sort
                ordered = magnitudes.sort().values
                around.append(torch.stack([ordered[k - 1], ordered[above - 1]]))
            else:
                around.append(torch.stack([magnitudes.kthvalue(n).values for n in (k, above)]))
        bounds = torch.stack([pair.to(around[0].device) for pair in around])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(bounds, 0)  # GPUs of another kind may round in another way
        # Between the two: at an entry itself, the rounding of its product would decide whether it is kept.
        log_tau, gone = bounds.mean(1).log(), bounds[:, 0]
        for _ in range(2):  # they may be equal, and the logarithm rounded down
            log_tau = torch.where(
                log_tau.exp() < gone, torch.nextafter(log_tau, torch.full_like(gone, torch.inf)), log_tau
            )
        for (gate, _), value in zip(self.gates, log_tau.unbind(), strict=True):
            assign(gate.log_tau, value.to(gate.log_tau.device))

    @torch.no_grad()
    def density(self) -> torch.Tensor:
        """Fraction of all entries with |D| > tau, as the sample has it: a scalar on the device."""
        shares = []
        for (gate, _), magnitudes, size in zip(self.gates, self._magnitudes(), self._sizes, strict=True):
            share = (magnitudes > whole(gate.log_tau).exp()).float().mean()
            shares.append(share * (size / sum(self._sizes)))
        return torch.stack([share.to(shares[0].device) for share in shares]).sum()


def entries(layers: list[JumpLoraLayer]) -> int:
    """Of all their weights."""
    return sum(layer.out_features * layer.in_features for layer in layers)

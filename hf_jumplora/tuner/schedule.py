"""The schedule of a gate: the ramp, the threshold and the density, as functions of the finished optimizer steps."""

import functools

import torch
from accelerate import PartialState
from torch import nn

from ..ops.quantile import kth_magnitude, update_blocks
from .config import JumpLoraConfig
from .density_sample import entries, share_to_keep
from .lookup import adapter_config, adapter_parameters, gate_groups, named_layers
from .sharded_parameters import assign, gathered, whole


def ramp(step: int, total_steps: int, config: JumpLoraConfig) -> float:
    """f = clip((step - s0) / (s1 - s0), 0, 1) after `step` finished optimizer steps; s0, s1 as in [`ramp_steps`]."""
    start, end = ramp_steps(total_steps, config)
    return min(1.0, max(0.0, (step - start) / (end - start)))


def ramp_steps(total_steps: int, config: JumpLoraConfig) -> tuple[int, int]:
    """(s0, s1) = (int(gate_start * T), int(gate_end * T)): the ramp starts after step s0 and is closed after s1.

    Raises:
        ValueError: the task is too short for its schedule.
    """
    start, end = int(config.gate_start * total_steps), int(config.gate_end * total_steps)
    if not 1 <= start < end:
        raise ValueError(
            f"{total_steps} optimizer steps are too few for gate_start={config.gate_start}, gate_end={config.gate_end} "
            f"(the ramp would run from step {start} to {end}; it needs 1 <= start < end): give the task more data or "
            "epochs, a smaller batch, or a wider ramp"
        )
    return start, end


def density_at(step: int, total_steps: int, config: JumpLoraConfig) -> float | None:
    """Fraction of entries to keep after `step` finished steps, s0 <= step; None: as many as A and B have parameters.

    A pure function of the steps. With a `density_schedule`, f = [`ramp`]: target + (initial - target) * (1 - f), or
    (1 - f)^3 for "cubic". Without: `initial_density` at s0 and `target_density` after it, either standing for both.
    """
    initial, target = config.initial_density or config.target_density, config.target_density or config.initial_density
    if initial is None or target is None or step == ramp_steps(total_steps, config)[0]:
        return initial
    power = {"constant": 0, "linear": 1, "cubic": 3}[config.density_schedule]
    left = (1 - ramp(step, total_steps, config)) ** power if power else 0.0
    return target + (initial - target) * left


def set_mix(model: nn.Module, adapter: str, mix: float) -> None:
    """Set f of all gates of an adapter."""
    for gate, _ in gate_groups(model, adapter):
        gate.set_mix(mix)


def _add_over_processes(counts: torch.Tensor) -> None:
    moved = counts.to(PartialState().device)  # NCCL adds up on GPUs alone
    torch.distributed.all_reduce(moved)
    counts.copy_(moved)


def set_threshold(model: nn.Module, adapter: str, density: float | None, together: bool = False) -> None:
    """Set tau of every gate to the exact quantile of |D| over its layers.

    `density` is the fraction of entries kept; see [`share_to_keep`]. Entries closed by hard isolation are not kept, and
    count as entries.

    together: every process of a run calls this with the same adapter. They share the work, each taking some of the
    layers, and all set the same tau.
    """
    config, state = adapter_config(model, adapter), PartialState() if together else None
    taus = []
    with gathered(adapter_parameters(model, adapter)):
        for gate, layers in gate_groups(model, adapter):
            total = entries(layers)
            factors = [layer.factors(adapter) for layer in layers]
            k = min(max(1, total - round(share_to_keep(config, layers, adapter, density) * total)), total)
            near = gate.log_tau.detach().exp().item()  # in the steps after the start, a good guess
            if state is not None and state.num_processes > 1:
                mine = factors[state.process_index :: state.num_processes]
                tau = kth_magnitude(functools.partial(update_blocks, mine), k, _add_over_processes)
            else:
                tau = kth_magnitude(functools.partial(update_blocks, factors), k, near=near)
            if tau == 0:
                raise ValueError(
                    f"the threshold of adapter {adapter!r} cannot start: at least {k} of {total} entries of its "
                    "updates are exactly zero or closed. Either it has not been trained (learning rate 0, or still in "
                    "the warm-up at gate_start?), or isolation='hard' leaves fewer entries free than it shall keep: "
                    "lower initial_density or target_density"
                )
            log_tau = torch.full_like(gate.log_tau, tau).log()
            while log_tau.exp() < tau:  # the logarithm was rounded down: the k-th entry would be kept after all
                log_tau = torch.nextafter(log_tau, torch.full_like(log_tau, torch.inf))
            taus.append((gate, log_tau.item()))
    for gate, value in taus:
        assign(gate.log_tau, value)


def check_thresholds(model: nn.Module, adapter: str) -> None:
    """Raise FloatingPointError when a threshold of this adapter is no finite number. Every process must call it."""
    for gate, layers in gate_groups(model, adapter):
        log_tau = whole(gate.log_tau)
        if not torch.isfinite(log_tau.exp()).all():
            raise FloatingPointError(
                f"the threshold of adapter {adapter!r} (layer {layers[0].layer_name}) has diverged: log_tau is "
                f"{log_tau.item():g}, and no entry would be kept. Lower gate_learning_rate or the learning rate; "
                "finished tasks are safe"
            )


def density(model: nn.Module, adapter: str) -> float:
    """Fraction of the adapted entries with |D| > tau (of a finished adapter: in its support). 1.0 without a gate."""
    total, counts = 0, []
    with gathered(adapter_parameters(model, adapter)):
        for _, layer in named_layers(model, adapter):
            total += layer.out_features * layer.in_features
            if adapter not in layer.jumplora_gate:
                counts.append(torch.tensor(layer.out_features * layer.in_features))
            elif adapter in layer.jumplora_support:
                counts.append(layer.support(adapter).sum())
            else:
                tau = layer.gate(adapter).log_tau.detach().exp()
                blocks = update_blocks([layer.factors(adapter)])
                counts.append(torch.stack([(block.abs() > tau).sum() for block in blocks]).sum())
    return int(sum(count.to(counts[0].device) for count in counts)) / total  # the only wait for the device

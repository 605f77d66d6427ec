"""OSF ("Sculpting Subspaces", arXiv 2504.07097): full fine-tuning of each weight's small singular directions."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import OSFConfig
from torch import nn

from ..tuner import named_layers
from ..tuner.lookup import adapter_config
from ..tuner.peft_compat import OSFLinear, osf_factors
from .base import Strategy, check_alone, refuse_options


@dataclass
class Osf(Strategy):
    """Each task decomposes the weights, the earlier tasks' updates in them, by PEFT's OSF layers,

        W = U_high S_high V_high + U_low S_low V_low,

    and trains U_low [out, t], S_low [t] and V_low [t, in] in place of the adapter; gradients of U_low and V_low lose
    their part in the space of U_high and V_high. After the task the layers are taken out again, and its update

        dW = U_low S_low V_low - (the same at the start) = B A, B = [U_low S_low, -U_0 S_0], A = [V_low; V_0],

    becomes the adapter, exactly, with scaling 1 and rank 2 t (where that is above min(out, in): dW itself and an
    identity). Task number i trains t = (1 - preserved) * shrink^i * min(out, in) directions, so that the preserved rank
    rises; r, lora_alpha and lora_dropout of the adapter have no effect. No state: PEFT saves the trained factors with a
    checkpoint's adapter, and a restart decomposes the same weights again.

    The values are ours: PEFT preserves half by default, the paper chooses ranks by the layers' importance.
    """

    preserved: float = 0.5
    shrink: float = 0.75
    layers: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if not 0 <= self.preserved < 1 or not 0 < self.shrink <= 1:
            raise ValueError(
                f"OSF needs 0 <= preserved < 1 and 0 < shrink <= 1, got preserved={self.preserved} and "
                f"shrink={self.shrink}"
            )

    def check(self, mode, config):
        if config.gate or mode != "incremental":
            raise ValueError(
                "OSF trains the directions of the weights themselves, one update per task on top of the earlier ones "
                "and without a gate: use it through method='osf'"
            )

    def check_run(self, others, args, sharding):
        because = "they act on the adapter's factors"
        check_alone("OSF", others, sharding, "reads whole weights and factors", because)
        names = ("factor_optimizer", "loraplus_lr_ratio", "allora_eta")
        refuse_options(args, names, "is for A and B, and OSF trains neither")

    @torch.no_grad()
    def on_task_start(self, model, adapter, examples):
        number = len(adapter_config(model, adapter).parent_adapters)
        self.layers = {}
        for name, layer in named_layers(model, adapter):
            base = layer.base_layer
            if layer.quantization_backend is not None or type(base) is not nn.Linear:
                raise ValueError(
                    f"OSF decomposes float weights of nn.Linear, and {name} is {type(base).__name__}: leave it out of "
                    "target_modules, or load the base without quantization"
                )
            smaller = min(base.weight.shape)
            rank = smaller - max(1, int((1 - self.preserved) * self.shrink**number * smaller))
            if rank == 0:
                raise ValueError(f"OSF with preserved={self.preserved} preserves no direction of {name}: raise it")
            osf = OSFLinear(base, adapter, OSFConfig(effective_rank=rank), effective_rank=rank)
            for part in osf.children():
                if part is not base:  # factors of a bf16 weight could not be trained in small steps
                    part.float()
            layer.base_layer = self.layers[name] = osf
            layer.jumplora_A[adapter].requires_grad_(False)
            layer.jumplora_B[adapter].requires_grad_(False).zero_()  # no update beside OSF's own

    @torch.no_grad()
    def on_task_end(self, model, adapter, examples):
        config = adapter_config(model, adapter)
        config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
        for name, layer in named_layers(model, adapter):
            osf = self.layers[name]
            now, start = osf_factors(osf, adapter)
            A = torch.cat([now["V_low"], start["V_low"]])
            B = torch.cat([now["U_low"] * now["S_low"], -start["U_low"] * start["S_low"]], 1)
            if len(A) > min(len(B), A.shape[1]):
                dW = B @ A
                wide = len(B) <= A.shape[1]
                B, A = (torch.eye(len(B)).to(A), dW) if wide else (dW, torch.eye(A.shape[1]).to(A))
            layer.base_layer = osf.base_layer
            config.rank_pattern[name] = config.alpha_pattern[name] = len(A)
            layer.update_layer(adapter, config, len(A), len(A), None)
            layer.jumplora_A[adapter].copy_(A)
            layer.jumplora_B[adapter].copy_(B)
        self.layers = {}

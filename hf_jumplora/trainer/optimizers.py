"""What the options of a run make of the Trainer's optimizer: groups of their own, Muon, AltLoRA, preconditioning."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..tuner import gate_groups, named_layers
from .altlora import AltLora
from .arguments import argument


def arrange_optimizer(optimizer: Optimizer, model: nn.Module, adapter: str, args: Any, sharded: bool) -> Optimizer:
    """The optimizer that trains A [r, in], B [out, r] and thresholds of an adapter as the arguments say.

    `gate_learning_rate`: a group for the thresholds, without weight decay. `loraplus_lr_ratio`: B's learning rate is
    that many times A's (LoRA+, arXiv 2402.12354). `factor_optimizer`: "muon" trains A and B with `torch.optim.Muon` and
    "altlora" or "altlora+" with [`AltLora`], all else stays where it is; "riemannian" preconditions their gradients
    before each step. `allora_eta`: gradients of A and B are [`RowScaledUpdate`]'s. Learning rate schedules act on every
    group in proportion.

    sharded: DeepSpeed, where no process sees a whole matrix.

    Raises:
        ValueError: a `factor_optimizer` when sharded; `allora_eta` with a gate or a `factor_optimizer`.
        ImportError: this torch has no Muon.
    """
    kind = argument(args, "factor_optimizer")
    if kind != "default" and sharded:
        raise ValueError(
            f"factor_optimizer={kind!r} works on whole matrices, which DeepSpeed shards: leave it out, "
            "or train with DDP or FSDP2"
        )
    layers = [layer for _, layer in named_layers(model, adapter)]
    eta = argument(args, "allora_eta")
    if eta is not None and (kind != "default" or any(adapter in layer.jumplora_gate for layer in layers)):
        raise ValueError(
            f"allora_eta={eta} changes the gradients of the factors of s B A: a gated update has others, and "
            f"factor_optimizer={kind!r} takes them as they are. Leave it out, or take inclora and the default optimizer"
        )
    for layer in layers:
        layer.allora_eta = eta
    pairs = [(layer.jumplora_A[adapter], layer.jumplora_B[adapter]) for layer in layers]
    if (rate := argument(args, "gate_learning_rate")) is not None:
        gates = [gate.log_tau for gate, _ in gate_groups(model, adapter)]
        _own_group(optimizer, gates, lr=rate, weight_decay=0.0)
    if (ratio := argument(args, "loraplus_lr_ratio")) is not None:
        _own_group(optimizer, [B for _, B in pairs], lr=ratio * args.learning_rate, weight_decay=args.weight_decay)
    if kind == "riemannian":
        optimizer.register_step_pre_hook(partial(_precondition, pairs, args.riemannian_reg))
    if kind not in ("muon", "altlora", "altlora+"):
        return optimizer
    groups = _take_out(optimizer, pairs)
    if kind == "muon":
        own = _muon(groups)
    else:
        own = AltLora(
            groups,
            [(*pair, layer.scaling[adapter]) for pair, layer in zip(pairs, layers, strict=True)],
            betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, damping=args.riemannian_reg,
            adaptive=kind == "altlora+",
        )  # fmt: skip
    return Chain(own, optimizer) if optimizer.param_groups else own


def _own_group(optimizer: Optimizer, params: list[nn.Parameter], **options: float) -> None:
    wanted = {id(p) for p in params}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in wanted]
    optimizer.add_param_group({"params": params, **options})


@torch.no_grad()
def _precondition(pairs: list, damping: float, *_: Any) -> None:
    """g_A <- (B^T B + damping I)^-1 g_A and g_B <- g_B (A A^T + damping I)^-1 (arXiv 2402.02347), as in PEFT."""
    for A, B in pairs:
        eye = damping * torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
        if A.grad is not None:
            A.grad.copy_(torch.linalg.solve(B.T @ B + eye, A.grad))
        if B.grad is not None:
            B.grad.copy_(torch.linalg.solve(A @ A.T + eye, B.grad, left=False))


def _take_out(optimizer: Optimizer, pairs: list) -> list[dict[str, Any]]:
    """The optimizer's groups of A and B, which it no longer has."""
    factors = {id(factor) for pair in pairs for factor in pair}
    groups = []
    for group in optimizer.param_groups:
        own = [p for p in group["params"] if id(p) in factors]
        group["params"] = [p for p in group["params"] if id(p) not in factors]
        if own:
            groups.append({"params": own, "lr": group["lr"], "weight_decay": group["weight_decay"]})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return groups


def _muon(groups: list[dict[str, Any]]) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"factor_optimizer='muon' needs torch.optim.Muon, which torch {torch.__version__} lacks: 2.9")
    # "match_rms_adamw": steps are as large as AdamW's at the same learning rate, whatever the shape.
    return torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw")


class Chain(Optimizer):
    """Several optimizers, each with its own parameters, that step together. Their groups are shared, not copied, so a
    learning rate schedule acts on all of them; the state of each is saved and loaded in full."""

    def __init__(self, *optimizers: Optimizer):
        self.optimizers = optimizers
        super().__init__([p for o in optimizers for group in o.param_groups for p in group["params"]], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure=None):  # type: ignore[override]  # torch overloads it for closures
        """One step of each. Raises ValueError for a closure: it would be evaluated once for each of them."""
        if closure is not None:
            raise ValueError("optimizers that step together take no closure")
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """{"optimizers": their state dicts, in order}."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of [`state_dict`]."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()

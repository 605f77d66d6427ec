"""Ranks that compete for each token (MoRA, arXiv 2506.21035; SMoRA, 2501.15103), in place of updates that add up."""

from typing import Any

import torch


def rank_weights(z: torch.Tensor, k: int, tau: float, delta: float = 0.0) -> torch.Tensor:
    """The weight of each rank for each token, from their activations z = A x [.., R] of all tasks' ranks.

    s = z / ||z||; the k largest (2 at least) have softmax(s / tau) over these k, all others 0. delta: those with s
    below it get 0 too, and the others stay as they are; 0: none does. Where z = 0 the result times z is 0.
    """
    s = z / z.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    top, index = s.topk(min(max(k, 2), s.shape[-1]))
    weights = (top / tau).softmax(-1)
    if delta:
        weights = weights * (top >= delta)
    return torch.zeros_like(s).scatter(-1, index, weights)


def has_router(routing: dict[str, float] | None) -> bool:
    """Whether a config's `rank_routing` is that of ranks chosen by a trained router (SMoRA)."""
    return routing is not None and routing.keys() == {"k"}


def router_weights(logits: torch.Tensor, b: torch.Tensor, k: int) -> torch.Tensor:
    """The weight of each rank for each token, from the router's logits W_r x [.., R] and the ranks' balance b [R].

    p = sigmoid(logits); the k ranks (1 at least) with the largest p + b share the weights p / (sum of their p), all
    others have 0. b chooses and does not weigh.
    """
    p = logits.sigmoid()
    index = (p + b).topk(min(max(k, 1), p.shape[-1])).indices
    p = p * torch.zeros_like(p).scatter(-1, index, 1.0)
    return p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def refuse_competing(competing: Any, what: str) -> None:
    """Raise ValueError if it is true that the ranks of tasks compete, so that `what` has no sum of updates to use."""
    if competing:
        raise ValueError(
            "the ranks of these tasks compete for each token (methods mora and smora): no weight is their sum, which "
            f"{what} needs. Load the whole stack with load_stack(path), or train another method"
        )

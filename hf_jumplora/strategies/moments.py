"""Second moments of the layers' inputs and output gradients over examples, and a penalty made of them."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ..ops.quadratic import quadratic_penalty
from ..tuner import can_continue, named_layers


TOKENS = 512  # pass through the model at once, with all that they activate


def layer_penalty(layer: Any, adapter: str, terms: list[tuple], roots: bool = False) -> torch.Tensor:
    """[`quadratic_penalty`] of an adapter's update on one layer, as it acts now."""
    A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
    options: dict[str, Any] = {}
    if adapter in layer.jumplora_gate:
        gate = layer.gate(adapter)
        options = {"log_tau": gate.log_tau, "mix": gate.mix}
        if adapter in layer.jumplora_free:
            options["free"] = layer.mask_free(
                adapter, torch.ones(B.shape[0], A.shape[1], dtype=torch.bool, device=A.device)
            )
    return quadratic_penalty(A, B, terms, scaling=layer.scaling[adapter], roots=roots, **options)


def check_examples(examples: int, general: Any) -> None:
    """Raise ValueError unless `examples` is a number of examples and `general` what a zeroth task can be made of."""
    if examples < 1:
        raise ValueError(f"examples must be positive, got {examples}")
    if isinstance(general, (str, bool)) and general is not True:
        raise ValueError(f"general is a list of texts, or True for the run's general_text; got {general!r}")


def batches(examples: Iterable[dict[str, Any]], tokens: int) -> Iterator[dict[str, Any]]:
    """Examples of equal shape joined to batches of at most `tokens` tokens: what padding would blur stays exact.

    A longer example passes alone. The pass keeps all activations, even where training does not (checkpointing), and
    which examples come together must not depend on the number of processes: labels are drawn in this order.
    """
    waiting: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for example in examples:
        if not all(isinstance(value, torch.Tensor) and value.ndim for value in example.values()):
            yield example
            continue
        group = waiting[tuple((key, tuple(value.shape)) for key, value in example.items())]
        group.append(example)
        if (len(group) + 1) * max(value.shape[-1] for value in example.values()) > tokens:
            yield _join(group)
            group.clear()
    for group in waiting.values():
        if group:
            yield _join(group)


def _join(group: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: torch.cat([example[key] for example in group]) for key in group[0]}


def sampled_log_likelihood(model: nn.Module, inputs: dict[str, Any], logits, generator) -> torch.Tensor:
    """Sum over the batch of log p(label), with labels drawn from the model itself, a scalar.

    logits: [batch, classes], or [batch, tokens, vocabulary]: then one label is drawn for each answer token, which are
    the positions that `inputs["labels"]` does not mask (-100), given the true answer before it.
    """
    if logits.ndim == 3:
        labels = inputs["labels"]
        if can_continue(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = logits[labels != -100]
    log_p = logits.float().log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
    return log_p.gather(-1, drawn).sum()


def input_moments(model: nn.Module, adapter: str, examples: Iterable[dict[str, Any]], tokens: int = TOKENS):
    """{layer: C [in, in]}, C = mean over all tokens of x x^T with x the layer's input; float32."""
    return _moments(model, adapter, examples, tokens, None, None)[1]


def kronecker_factors(
    model: nn.Module, adapter: str, examples, generator: torch.Generator, tokens: int = TOKENS, rank: int | None = None
):
    """{layer: G [out, out]}, {layer: C [in, in]}: the factors of the Fisher matrix (arXiv 1503.05671, 1805.07810).

    C = mean over tokens of x x^T. G = mean over examples of the sum over their tokens of g g^T, with g the gradient of
    log p(label) at the layer's output and the label drawn from the model.

    rank: with k, roots [out, k] and [in, k] in their place: root root^T is nearly the best approximation of rank k, and
    nothing larger than [d, 4 k + 8] is built (Nystroem sketch of the stream of tokens, arXiv 1706.05736).
    """
    G, C = _moments(model, adapter, examples, tokens, generator, rank)
    return (G, C) if rank is None else tuple({name: _root(t, rank) for name, t in part.items()} for part in (G, C))


@functools.cache
def _test_matrix(dim: int, rank: int, device: torch.device) -> torch.Tensor:
    """Orthonormal [dim, 4 rank + 8], the same for every layer of this size and in every process."""
    width = min(dim, 4 * rank + 8)
    return torch.linalg.qr(torch.randn(dim, width, generator=torch.Generator().manual_seed(0))).Q.to(device)


def _root(sketch: torch.Tensor, rank: int) -> torch.Tensor:
    """[d, rank] root of a positive matrix M from M T, T = [`_test_matrix`] (arXiv 1706.05736, algorithm 3)."""
    if not sketch.any():  # a layer that no answer depends on
        return sketch.new_zeros(len(sketch), min(rank, len(sketch)))
    Y, T = sketch.double(), _test_matrix(len(sketch), rank, sketch.device).double()
    shift = torch.finfo(torch.float32).eps * Y.norm()  # the sketch is of float32 sums: below this it is noise
    Y = Y + shift * T
    core = T.T @ Y
    lower = torch.linalg.cholesky((core + core.T) / 2 + shift * torch.eye(len(core), device=core.device))
    U, sigma, _ = torch.linalg.svd(torch.linalg.solve_triangular(lower, Y.T, upper=False).T, full_matrices=False)
    values = (sigma.square() - shift).clamp_min(0)
    return (U * values.sqrt())[:, :rank].to(sketch.dtype)


def _moments(model, adapter, examples, tokens, generator, rank):
    G: dict[str, torch.Tensor] = {}
    C: dict[str, torch.Tensor] = {}
    rows_seen: dict[str, int] = defaultdict(int)
    outputs: list[tuple[str, Any]] = []  # of the batch at work: layer, place in the graph
    count, mask = 0, None

    def add(sums, name, rows):
        test = None if rank is None else _test_matrix(rows.shape[-1], rank, rows.device)
        _add_square(sums, name, rows, test)

    def hook(name, layer, args, output):
        x = args[0].detach()
        keep = mask if mask is not None and mask.shape == x.shape[:-1] else None
        rows = x.reshape(-1, x.shape[-1]) if keep is None else x[keep.bool()]
        add(C, name, rows)
        rows_seen[name] += len(rows)
        if generator is not None:
            outputs.append((name, get_gradient_edge(output)))

    handles = [
        layer.register_forward_hook(lambda layer, args, output, name=name: hook(name, layer, args, output))
        for name, layer in named_layers(model, adapter)
    ]
    try:
        with evaluation(model), torch.set_grad_enabled(generator is not None):
            for inputs in batches(examples, tokens):
                mask = inputs.get("attention_mask")
                logits = model(**inputs)["logits"]
                count += len(logits)
                if generator is not None:
                    likelihood = sampled_log_likelihood(model, inputs, logits, generator)
                    # Not of parameters: under ZeRO-3 they have no gradient of their own shape.
                    grads = torch.autograd.grad(likelihood, [edge for _, edge in outputs], allow_unused=True)
                    for (name, _), g in zip(outputs, grads, strict=True):
                        if g is not None:
                            add(G, name, g.reshape(-1, g.shape[-1]))
                    outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("there is no example to take moments from")
    return {name: g / count for name, g in G.items()}, {name: c / rows_seen[name] for name, c in C.items()}


def _add_square(sums: dict[str, torch.Tensor], name: str, rows: torch.Tensor, test: torch.Tensor | None) -> None:
    """sums[name] += rows^T rows, times `test` if there is one."""
    rows = rows.float()
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        right = rows if test is None else rows @ test
        if name in sums:
            sums[name].addmm_(rows.T, right)
        else:
            sums[name] = rows.T @ right


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside: no dropout, no gradient checkpointing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

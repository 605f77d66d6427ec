"""Second moments of the layers' inputs and output gradients over examples, and a penalty made of them."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ..ops.quadratic import quadratic_penalty
from ..tuner import is_causal, named_layers


PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100, "token_type_ids": 0}


def tokens_at_once(device: torch.device) -> int:
    """Tokens that pass through the model at once, with all that they activate: what keeps a GPU busy, and a CPU's
    memory small."""
    return 512 if device.type == "cpu" else 4096


def layer_penalty(layer: Any, adapter: str, terms: list[tuple], roots: bool = False) -> torch.Tensor:
    """[`quadratic_penalty`] of an adapter's update on one layer, as it acts now."""
    A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
    options: dict[str, Any] = {}
    if adapter in layer.jumplora_gate:
        gate = layer.gate(adapter)
        options = {"log_tau": gate.log_tau, "mix": gate.mix, "free": layer.free_mask(adapter)}
    return quadratic_penalty(A, B, terms, scaling=layer.scaling[adapter], roots=roots, **options)


def check_examples(examples: int, general: Any) -> None:
    """Raise ValueError unless `examples` is a number of examples and `general` what a zeroth task can be made of."""
    if examples < 1:
        raise ValueError(f"examples must be positive, got {examples}")
    if isinstance(general, (str, bool)) and general is not True:
        raise ValueError(f"general is a list of texts, or True for the run's general_text; got {general!r}")


class Batch(NamedTuple):
    """Examples joined for one pass: `masks` [batch, length] are 1 at real tokens, one for each length that layers see;
    `numbers` are the examples' places in their own order."""

    inputs: dict[str, torch.Tensor]
    masks: list[torch.Tensor]
    numbers: list[int]


def batches(
    examples: Iterable[dict[str, Any]], tokens: int, seq2seq: bool = False, pad_token: int = 0
) -> Iterator[Batch]:
    """Examples of similar length joined to batches of at most `tokens` tokens, padded on the right.

    Each is a batch of one row. A longer one passes alone; examples with other inputs than PADDING's are joined where
    their shapes are equal. Padding changes nothing but rounding: its rows are masked, in the model and in the moments.

    pad_token: of the model's config: classifiers look for the last token that is another one.
    """
    padding = PADDING | {"input_ids": pad_token}
    waiting: dict[Any, list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)
    for number, example in enumerate(examples):
        shapes = tuple((key, tuple(value.shape)) for key, value in example.items() if isinstance(value, torch.Tensor))
        rows = len(shapes) == len(example) and all(shape and shape[0] == 1 for _, shape in shapes)
        padded = rows and all(len(shape) == 1 or (key in PADDING and len(shape) == 2) for key, shape in shapes)
        if not rows:
            mask = example.get("attention_mask")
            yield Batch(example, [] if mask is None else [mask], [number])
            continue
        length = max(shape[-1] for _, shape in shapes)
        waiting[tuple(example) if padded else shapes].append((length, number, example))
    for entries in waiting.values():
        entries.sort(key=lambda entry: entry[0])
        some: list[tuple[int, int, dict[str, Any]]] = []
        for entry in entries:  # in ascending length: the next is the longest
            if some and (len(some) + 1) * entry[0] > tokens:
                yield _join(some, seq2seq, padding)
                some = []
            some.append(entry)
        yield _join(some, seq2seq, padding)


def _join(some: list[tuple[int, int, dict[str, Any]]], seq2seq: bool, padding: dict[str, int]) -> Batch:
    numbers, rows = [number for _, number, _ in some], [example for _, _, example in some]
    if len(rows) == 1 and not seq2seq:
        mask = rows[0].get("attention_mask")
        return Batch(rows[0], [] if mask is None else [mask], numbers)
    widths = {key: max(row[key].shape[-1] for row in rows) for key, value in rows[0].items() if value.ndim == 2}
    if seq2seq and widths.get("labels") == widths.get("input_ids"):
        widths["labels"] += 1  # by its length, a layer's input then says whether it is the decoder's
    inputs = {
        key: _pad([row[key] for row in rows], widths[key], padding.get(key, 0))
        if key in widths
        else torch.cat([row[key] for row in rows])
        for key in rows[0]
    }
    masks = []
    if "input_ids" in widths:
        lengths = [row["input_ids"].shape[-1] for row in rows]
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = _ones(lengths, widths["input_ids"], inputs["input_ids"].device)
            if len(set(lengths)) > 1:
                inputs["attention_mask"] = mask
        masks.append(mask)
    if seq2seq and "labels" in widths:
        lengths = [row["labels"].shape[-1] for row in rows]
        masks.append(_ones(lengths, widths["labels"], inputs["labels"].device))
    return Batch(inputs, masks, numbers)


def _pad(rows: list[torch.Tensor], width: int, value: int) -> torch.Tensor:
    """[rows, width] of rows [1, length], filled up with `value`; in as many operations for many rows as for few."""
    lengths = [row.shape[-1] for row in rows]
    if set(lengths) == {width}:
        return torch.cat(rows)
    ends = torch.tensor(lengths).cumsum(0)[:, None]
    places, starts = torch.arange(width), ends - torch.tensor(lengths)[:, None]
    places = torch.where(starts + places < ends, starts + places, ends[-1])  # the last one is the padding
    flat = F.pad(torch.cat(rows, 1)[0], (0, 1), value=value)
    return flat[places.to(flat.device, non_blocking=True)]


def _ones(lengths: list[int], width: int, device: torch.device) -> torch.Tensor:
    """[rows, width]: 1 in the first so many columns of each row."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long().to(device)


def uniforms(seed: int, numbers: list[int], counts: list[int]) -> torch.Tensor:
    """`counts[i]` random numbers in [0, 1) for each example, of its own number alone: another batch, order or number of
    processes gives it the same ones."""
    generator = torch.Generator()
    drawn = [
        torch.rand(count, generator=generator.manual_seed((seed << 20) + number), dtype=torch.float64)
        for number, count in zip(numbers, counts, strict=True)
    ]
    return torch.cat(drawn)


def sampled_log_likelihood(model: nn.Module, inputs: dict[str, Any], logits, draw: Callable) -> torch.Tensor:
    """Sum over the batch of log p(label), with labels drawn from the model itself, a scalar.

    logits: [batch, classes], or [batch, tokens, vocabulary]: then one label is drawn for each answer token, which are
    the positions that `inputs["labels"]` does not mask (-100), given the true answer before it.
    draw: from the numbers of labels of each example to as many uniform random numbers in [0, 1), one after the other.
    """
    counts = [1] * len(logits)
    if logits.ndim == 3:
        labels = inputs["labels"]
        if is_causal(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        answers = (labels != -100).cpu()  # the one wait of a batch
        counts = answers.sum(1).tolist()
        logits = logits.flatten(0, 1)[answers.flatten().nonzero().view(-1).to(logits.device, non_blocking=True)]
    log_p = logits.float().log_softmax(-1)
    with torch.no_grad():
        reached = log_p.exp().to(torch.float32 if log_p.device.type == "mps" else torch.float64).cumsum(-1)
        share = draw(counts).to(reached.dtype).to(reached.device, non_blocking=True) * reached[:, -1]
        drawn = torch.searchsorted(reached, share[:, None], right=True).clamp_(max=log_p.shape[-1] - 1)
    return log_p.gather(-1, drawn).sum()


def input_moments(model: nn.Module, adapter: str, examples: Iterable[dict[str, Any]]):
    """{layer: C [in, in]}, C = mean over all tokens of x x^T with x the layer's input; float32."""
    return _moments(model, adapter, examples, None, None, None)[1]


def kronecker_factors(
    model: nn.Module, adapter: str, examples, seed: int, tokens: int | None = None, rank: int | None = None
):
    """{layer: G [out, out]}, {layer: C [in, in]}: the factors of the Fisher matrix (arXiv 1503.05671, 1805.07810).

    C = mean over tokens of x x^T. G = mean over examples of the sum over their tokens of g g^T, with g the gradient of
    log p(label) at the layer's output and the label drawn from the model. Layers that share an input share the tensor.

    seed: of the labels. tokens: of a batch; None: [`tokens_at_once`].
    rank: with k, roots [out, k] and [in, k] in their place: root root^T is nearly the best approximation of rank k, and
    nothing larger than [d, 4 k + 8] is built (Nystroem sketch of the stream of tokens, arXiv 1706.05736).
    """
    G, C = _moments(model, adapter, examples, tokens, seed, rank)
    return (G, C) if rank is None else (by_shape(roots, rank, G), by_shape(roots, rank, C))


def by_shape(function: Callable, rank: int, *matrices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`function(*stacks [layers, d, n], rank)` for the matrices of all layers of one shape at once; a matrix that is
    shared by several layers is computed once, and its result is shared."""
    groups: dict[tuple, dict[tuple, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in matrices[0]:
        own = [part[name] for part in matrices]
        groups[(*(t.shape for t in own), own[0].device)][tuple(id(t) for t in own)].append(name)
    result: dict[str, torch.Tensor] = {}
    for group in groups.values():
        firsts = [names[0] for names in group.values()]
        found = function(*(torch.stack([part[name] for name in firsts]) for part in matrices), rank)
        for names, value in zip(group.values(), found.unbind(), strict=True):
            result |= dict.fromkeys(names, value.contiguous())
    return {name: result[name] for name in matrices[0]}


@functools.cache
def _test_matrix(dim: int, rank: int, device: torch.device) -> torch.Tensor:
    """Orthonormal [dim, 4 rank + 8], the same for every layer of this size and in every process."""
    width = min(dim, 4 * rank + 8)
    start = torch.randn(dim, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return torch.linalg.qr(start).Q.to(device)


def roots(sketches: torch.Tensor, rank: int) -> torch.Tensor:
    """[layers, d, rank] roots of positive matrices M from M T [layers, d, n], T = [`_test_matrix`] (arXiv 1706.05736,
    algorithm 3). Zeros for a layer that no answer depends on."""
    Y, T = sketches.double(), _test_matrix(sketches.shape[1], rank, sketches.device).double()
    norm = Y.flatten(1).norm(dim=1)[:, None, None]
    shift = torch.finfo(torch.float32).eps * norm  # the sketch is of float32 sums: below this it is noise
    shift = torch.where(norm > 0, shift, torch.ones_like(shift))
    Y = Y + shift * T
    core = T.T @ Y
    lower = _cholesky((core + core.mT) / 2, shift)
    X = torch.linalg.solve_triangular(lower, Y.mT, upper=False).mT
    values, scaled = _largest(X, rank)
    kept = ((values - shift.flatten(1)).clamp_min(0) / values.clamp_min(1e-300)).sqrt()
    return torch.where(norm > 0, scaled * kept[:, None], 0.0).to(sketches.dtype)


def _cholesky(core: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Of positive matrices [layers, n, n] but for rounding: with shift [layers, 1, 1] added to the diagonal, or ten
    times as much where that is not enough."""
    eye = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    for factor in (1, 10, 100):
        lower, failed = torch.linalg.cholesky_ex(core + factor * shift * eye)
        if not failed.any():  # one wait for all layers of a shape
            return lower
    return torch.linalg.cholesky(core + 1000 * shift * eye)


def joined_roots(old: torch.Tensor, new: torch.Tensor, rank: int) -> torch.Tensor:
    """[layers, d, k] whose squares are nearly old old^T + new new^T, for roots [layers, d, ...]."""
    return _largest(torch.cat([old, new], 2).double(), rank)[1].to(new.dtype)


def _largest(X: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(squares of the largest singular values [layers, k], X V [layers, d, k]) by the small Gram matrices X^T X."""
    values, V = torch.linalg.eigh(X.mT @ X)
    k = min(rank, *X.shape[1:])
    return values[:, -k:].flip(1), X @ V[:, :, -k:].flip(2)


def _moments(model, adapter, examples, tokens, seed, rank):
    layers = named_layers(model, adapter)
    G: dict[str, torch.Tensor] = {}
    C: dict[str, torch.Tensor] = {}
    rows_seen: dict[str, torch.Tensor] = {}
    shares: dict[str, str] = {}  # layer -> the first one that has the same input
    outputs: list[tuple[str, Any]] = []  # of the batch at work: layer, place in the graph
    masks: list[torch.Tensor] = []
    count, first = 0, True
    last: tuple[Any, str] = (None, "")  # input, and the first layer that had it

    def add(sums, name, rows):
        test = None if rank is None else _test_matrix(rows.shape[-1], rank, rows.device)
        _add_square(sums, name, rows, test)

    def hook(name, layer, args, output):
        nonlocal last
        if seed is not None:
            outputs.append((name, get_gradient_edge(output)))
        x = args[0]
        # By its memory: DeepSpeed hands each module an object of its own.
        same = last[0] is not None and x.data_ptr() == last[0].data_ptr() and x.shape == last[0].shape
        if same and (first or shares.get(name) == last[1]):
            shares[name] = last[1]
            return
        if name in shares:
            raise RuntimeError(f"layer {name} had the input of {shares[name]} in one batch and another one in the next")
        last = (x, name)
        x = x.detach()
        mask = next((mask for mask in masks if mask.shape == x.shape[:-1]), None)
        if mask is None:
            seen, rows = x.new_tensor(0.0).double() + x[..., 0].numel(), x
        else:
            seen, rows = mask.sum().double(), x * mask[..., None].to(x.dtype)
        add(C, name, rows.reshape(-1, x.shape[-1]))
        rows_seen[name] = rows_seen[name] + seen if name in rows_seen else seen

    handles = [layer.register_forward_hook(functools.partial(hook, name)) for name, layer in layers]
    tokens = tokens or tokens_at_once(next(model.parameters()).device)
    config: Any = getattr(model, "config", None)
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    try:
        with evaluation(model), torch.set_grad_enabled(seed is not None):
            for batch in batches(examples, tokens, seq2seq, _pad_token(config)):
                inputs, masks, last = batch.inputs, batch.masks, (None, "")
                output = model(**inputs)
                count += len(batch.numbers) if seed is None else len(output["logits"])
                first = False
                if seed is not None:
                    draw = functools.partial(uniforms, seed, batch.numbers)
                    likelihood = sampled_log_likelihood(model, inputs, output["logits"], draw)
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
    C = {name: c / rows_seen[name].to(c.dtype) for name, c in C.items()}
    return {name: g / count for name, g in G.items()}, C | {name: C[owner] for name, owner in shares.items()}


def _pad_token(config: Any) -> int:
    """The pad token of a model's config, or 0 where it has none that can be embedded."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    token = getattr(text, "pad_token_id", None)
    return token if token is not None and 0 <= token < getattr(text, "vocab_size", 0) else 0


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
    """Evaluation mode inside: no dropout, no gradient checkpointing; backward passes stay on this thread, as in a
    training step."""
    training = model.training
    model.eval()
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        model.train(training)

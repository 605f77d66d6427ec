"""What training needs of memory, in bytes per process: the formulas behind `hf-jumplora estimate`.

Weights and activations are counted, not guessed: the model's own code runs once on the meta device, where tensors have
shapes and no content, and what autograd keeps for the backward pass is added up. Everything else is arithmetic on the
sizes of the adapted layers. Not counted: the CUDA context and what the allocator loses (1 to 2 GiB on a GPU), the
libraries, dropout, autocast (the model computes in the dtype of its weights), attention other than SDPA.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .methods import get_method
from .ops.blocked import BLOCK_ENTRIES
from .schema import UNDER
from .strategies import LayerSize
from .strategies.moments import tokens_at_once
from .tuner import JumpLoraConfig, named_layers


# As published with the weights (arXiv 2307.09288), so that nobody needs access to a gated repository to plan.
_LLAMA_2 = {  # hidden, feed-forward, layers, heads, key and value heads
    "llama-2-7b": (4096, 11008, 32, 32, 32),
    "llama-2-13b": (5120, 13824, 40, 40, 40),
    "llama-2-70b": (8192, 28672, 80, 64, 8),
}
SHARDED = ("zero3", "zero3_offload", "fsdp2")  # each process has a piece of the base
ZERO_BUCKET = 10**7  # reduce_bucket_size of recipes/deepspeed, in numbers
# DeepSpeed's defaults, in numbers: stage3_max_live_parameters and max_reuse_distance; stage3_prefetch_bucket_size.
ZERO3_LIVE, ZERO3_PREFETCH = 10**9, 5 * 10**7


@dataclass
class Plan:
    """A training run. batch and length are those of one process and one forward pass; `tasks` are finished before.

    density: fraction of the adapted entries that a task keeps; None: as many as A and B have parameters (published).
    """

    processes: int = 1
    batch: int = 8
    length: int = 512
    dtype: torch.dtype = torch.bfloat16
    gradient_checkpointing: bool = False
    tasks: int = 0
    density: float | None = None
    method: str = "jumplora"


@dataclass
class Sizes:
    """Of a model with an adapter: counts of numbers, `weights` and `weights_4bit` in bytes."""

    weights: int
    weights_4bit: int
    parameters: int
    block: int  # parameters of the largest block
    root: int  # parameters outside of blocks
    largest: int  # entries of the largest linear layer
    entries: int  # of the adapted layers
    layer: int  # entries of the largest adapted layer
    inputs: int  # of the widest adapted layer
    factors: int  # A, B and the thresholds
    vocabulary: int


def model_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The config of a model: a built-in name, a folder or a Hub id (config.json alone is downloaded).

    Raises:
        ValueError: no such folder or repository, or it needs code of its own.
    """
    if name.lower() in _LLAMA_2:
        hidden, wide, layers, heads, groups = _LLAMA_2[name.lower()]
        return LlamaConfig(
            vocab_size=32000, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=4096,
        )  # fmt: skip
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"{name} is none of {', '.join(_LLAMA_2)}, and cannot be read ({error})") from error


def skeleton(config: PretrainedConfig, adapter: JumpLoraConfig, dtype: torch.dtype) -> nn.Module:
    """The model with an adapter, on the meta device. Raises ValueError as `get_peft_model`."""
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT asks every transformers model for a property that transformers 5 has renamed.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        return get_peft_model(auto.from_config(config, dtype=dtype, attn_implementation="sdpa"), adapter)


def sizes(model: Any) -> Sizes:
    """Of a model from [`skeleton`]."""
    base = model.get_base_model()
    own = {id(p): p for n, p in base.named_parameters() if ".jumplora_" not in n}
    layers = [layer for _, layer in named_layers(model)]
    head = base.get_output_embeddings()
    linear = [m.weight for m in base.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    ids = {id(w) for w in linear}
    kept = sum(p.nbytes for p in own.values() if id(p) not in ids)
    blocks = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    units = [sum(p.numel() for n, p in b.named_parameters() if ".jumplora_" not in n) for b in blocks]
    entries = [layer.out_features * layer.in_features for layer in layers]
    return Sizes(
        weights=sum(p.nbytes for p in own.values()),
        # 4 bits an entry and a float32 scale for each 64
        weights_4bit=kept + sum(w.numel() // 2 + 4 * math.ceil(w.numel() / 64) for w in linear),
        parameters=sum(p.numel() for p in own.values()),
        block=max(units, default=0),
        root=sum(p.numel() for p in own.values()) - sum(units),
        largest=max(w.numel() for w in linear),
        entries=sum(entries),
        layer=max(entries),
        inputs=max(layer.in_features for layer in layers),
        factors=sum(p.numel() for p in model.parameters() if p.requires_grad),
        vocabulary=head.weight.shape[0],
    )


# ---- activations -------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Keeps what the kernels behind SDPA keep: its inputs, its output and one float32 a query."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


class _Fused(TorchFunctionMode):
    """On the meta device SDPA takes its reference form, which keeps the scores of all pairs of tokens. And tensors have
    no values there: models ask whether all tokens count, and they do.

    zero3: DeepSpeed puts a function of its own in the place of `F.linear`, which keeps x beside a frozen weight too.
    """

    def __init__(self, zero3: bool):
        super().__init__()
        self.zero3 = zero3

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__bool__:
            return True
        if func is F.linear and self.zero3:
            return _Adapted.apply(func(*args, **(kwargs or {})), args[0])
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(given["query"], given["key"], given["value"], given.get("attn_mask"))
        return func(*args, **(kwargs or {}))


class _Adapted(torch.autograd.Function):
    """Keeps what an adapted layer keeps: x. Weights and factors are there anyway."""

    @staticmethod
    def forward(ctx, y, x, A=None):  # with A as an input, autograd records the layer
        ctx.save_for_backward(x)
        return y.view_as(y)


def activations(model: Any, batch: int, length: int, checkpointing: bool, zero3: bool = False) -> tuple[int, int]:
    """(bytes kept from the forward pass for the backward pass, bytes that one block's backward pass needs on top).

    With gradient checkpointing every block keeps its input alone, and the current block is recomputed: its own
    activations are in the second number. That also holds the gradients of the block's widest activations, three of
    them (in a gated feed-forward layer those of gate, up and their product are there at once).
    """
    base = model.get_base_model()
    here = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}  # storage -> bytes
    blocks: list[dict[int, int]] = []
    inputs: list[int] = []
    inside = [False]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in here and all(storage._cdata not in known for known in (kept, *blocks)):
            (blocks[-1] if inside[0] else kept)[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # else its storage's address is that of another one later
        return tensor

    def enter(block, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        inputs.append(hidden.nbytes)
        blocks.append({})
        inside[0] = True

    def leave(block, args, kwargs, output):
        inside[0] = False

    alive: list[torch.Tensor] = []
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    extra = {"decoder_input_ids": tokens} if base.config.is_encoder_decoder else {}
    with ExitStack() as stack:
        for _, layer in named_layers(model):
            _patch(stack, layer, layer.base_layer, layer.jumplora_A["default"])
        for block in (m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)):
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave, with_kwargs=True).remove)
        if checkpointing:
            base.enable_input_require_grads()
            stack.callback(base.disable_input_require_grads)
        stack.enter_context(_Fused(zero3))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        base.train()(input_ids=tokens, use_cache=False, **extra)
    whole = [sum(block.values()) for block in blocks]
    widest = 3 * max((size for block in blocks for size in block.values()), default=0)
    if checkpointing:
        return sum(kept.values()) + sum(inputs), max(whole, default=0) + widest
    return sum(kept.values()) + sum(whole), widest


def _patch(stack: ExitStack, layer: nn.Module, base: Callable, A: torch.Tensor) -> None:
    layer.forward = lambda x: _Adapted.apply(base(x), x, A)  # type: ignore[method-assign]
    stack.callback(lambda: vars(layer).pop("forward"))


# ---- the whole ---------------------------------------------------------------------------------------------------


def share_after(tasks: int, density: float, disjoint: bool) -> float:
    """Fraction of the adapted entries that `tasks` tasks of this density change, independently drawn or disjoint."""
    return min(1.0, tasks * density) if disjoint else 1 - (1 - density) ** tasks


def live_sum(entries: int, share: float) -> int:
    """The sum of the finished tasks beside a quantised base: 8 bytes a non-zero entry, from a half on dense float32
    (on a CPU from 4 % on, for speed)."""
    return round(8 * share * entries) if share < 0.5 else 4 * entries


def trained(under: str, factors: int, processes: int) -> dict[str, int]:
    """Bytes of A, B and the thresholds, of their gradients and of AdamW's state, all in float32; `buckets` for sending.

    FSDP2 shards the base alone; what is trained is DDP's, whose buckets are a second copy of the gradients. DeepSpeed
    keeps a master copy beside the two moments, and buckets of a fixed size. ZeRO-1 shards the optimizer's state, ZeRO-2
    the gradients too, ZeRO-3 also the factors.
    """
    f, n = 4 * factors, processes
    if not under.startswith("zero"):
        return {"factors": f, "gradients": f, "optimizer": 2 * f, "buckets": f if n > 1 else 0}
    return {
        "factors": f // n if under in SHARDED else f,
        "gradients": f if under == "zero1" else f // n,
        "optimizer": 3 * f // n,
        "buckets": 4 * ZERO_BUCKET,
    }


def estimate(config: PretrainedConfig, adapter: JumpLoraConfig, plan: Plan) -> dict[str, dict[str, int]]:
    """{way to train: {part: bytes per process}}; the ways are those of `UNDER`, the parts add up to `total`.

    Parts: `weights` of the base (this process's share); `gathered` (ZeRO-3, FSDP2: whole weights that are there at a
    time, and ZeRO-3's buffer); `factors`, `gradients`, `optimizer` and `buckets` (see [`trained`]); `past` (masks of
    hard isolation, ELLA's sum, kfac's factors, the live sum over a 4-bit base); `activations` kept for the backward
    pass; `backward` (what it needs on top at its peak: the logits' gradients, or those of one block); `workspace` of
    the adapted layers. `host` is memory of the CPU on top of that: originals of merged weights, the sum of the finished
    tasks, what is offloaded.

    Raises:
        ValueError: a target module that is not there, or a method whose strategies remember what is not counted here.
    """
    method = get_method(plan.method)
    strategies = [make() for make in method.strategies]
    model = skeleton(config, adapter, plan.dtype)
    size = sizes(model)
    density = 1.0 if not adapter.gate else plan.density or size.factors / size.entries
    share = share_after(plan.tasks, density, adapter.isolation == "hard")
    layers = [
        LayerSize(layer.out_features, layer.in_features, len(layer.jumplora_A["default"]), adapter.gate, share)
        for _, layer in named_layers(model)
    ]
    remembered = [strategy.memory_bytes(layers, plan.tasks) for strategy in strategies]
    memory = sum(known for known in remembered if known is not None)
    if method.mode != "incremental" or None in remembered:
        raise ValueError(
            f"the memory of method {plan.method!r} is not known: it does not train one adapter per task, or one of its "
            "strategies has no `memory_bytes`."
        )
    needs = {  # under ZeRO-3 or not
        zero3: activations(model, plan.batch, plan.length, plan.gradient_checkpointing, zero3)
        for zero3 in (False, True)
    }
    tokens, width, n = plan.batch * plan.length, plan.dtype.itemsize, plan.processes
    # Of the loss: log-probabilities, their gradient and the logits' are there at once, in float32.
    loss = 12 * tokens * size.vocabulary
    if any("forward" in s.requires for s in strategies):  # its own pass over examples, without checkpointing
        at_once = max(1, tokens_at_once(torch.device("cuda")) // plan.length)
        for zero3, (kept, block) in needs.items():
            needs[zero3] = max(kept, activations(model, at_once, plan.length, False, zero3)[0]), block
        # Logits of the answers, log-probabilities and the way back through them; here every token is an answer.
        loss = max(loss, 24 * at_once * plan.length * size.vocabulary)
    loss = max([loss, *(s.logit_bytes(tokens * size.vocabulary, width, plan.tasks) for s in strategies)])
    if adapter.isolation == "hard" and plan.tasks:
        memory += size.entries // 8
    # Blocks of D, E and a gradient, which entries are near the threshold, the tokens transposed.
    workspace = 13 * min(BLOCK_ENTRIES, size.layer) + 4 * tokens * size.inputs
    workspace = max([workspace, *(strategy.workspace_bytes(layers, plan.tasks) for strategy in strategies)])
    newest = 4 * size.factors if plan.tasks else 0  # stays an adapter until the next task is finished
    summed = 4 * size.entries + size.entries // 8 if plan.tasks > 1 else 0
    originals = width * size.entries if plan.tasks else 0
    rows = {}
    for under in UNDER:
        four_bit, part = under == "ddp_4bit", n if under in SHARDED else 1
        kept, block = needs[under.startswith("zero3")]
        if under == "fsdp2":  # what is outside of blocks, the current block and the next one
            gathered = width * min(size.parameters, size.root + 2 * size.block)
        else:  # what is fetched ahead arrives in a buffer, and is copied out of it
            gathered = width * (min(size.parameters, ZERO3_LIVE) + min(size.parameters, ZERO3_PREFETCH))
        row = {
            "weights": (size.weights_4bit if four_bit else size.weights) // part,
            "gathered": gathered if part > 1 else 0,
            **trained(under, size.factors, n),
            "past": memory + (live_sum(size.entries, share) if four_bit and plan.tasks else 0),
            "activations": kept,
            "backward": max(loss, block + (width * size.largest if four_bit else 0)),
            "workspace": workspace,
        }
        row["factors"] += newest
        host = summed + (0 if four_bit else originals // part)
        if under == "zero3_offload":
            host += row["weights"] + row["optimizer"]
            row |= {"weights": 0, "optimizer": 0, "gathered": gathered}
        rows[under] = {**row, "total": sum(row.values()), "host": host}
    return rows

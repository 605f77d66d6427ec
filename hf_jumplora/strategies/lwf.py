"""LwF (arXiv 1606.09282): answer the new task's inputs much as the model before it did."""

from dataclasses import dataclass
from typing import Any

import torch

from ..tuner import is_causal, named_layers, without_adapter
from .base import Strategy


_FOR_A_LOSS = ("labels", "fused_lm_head")  # without them a causal model returns logits; the second one is TRL's


@dataclass
class Lwf(Strategy):
    """weight * temperature^2 * mean KL(p_before || p), p = softmax(logits / temperature), on the task's own inputs.

    The mean is over examples, or over the answer tokens (labels other than -100), of a whole step where the loss is.
    p_before is the stack without the new adapter: no second model, one more forward pass. Nothing in the first task.
    No state. The temperature 2 is the paper's; its weight is 1.

    every: n adds the penalty, n times as heavy, to the last of every n steps alone: a cheaper estimate of the same.
    mask_target: compare only the answers that are not the row's own ("Mask the Target", arXiv 2605.29498), each side
    normalised over these: what the model makes of the right answer is then the task's alone.
    hidden: adds hidden * mean squared distance of the last hidden states from the teacher's, over tokens that are not
    padding (of a decoder behind an encoder: those with a label). It costs two more forward passes.
    """

    requires = frozenset({"softmax"})

    weight: float = 1.0
    temperature: float = 2.0
    every: int = 1
    mask_target: bool = False
    hidden: float = 0.0

    def __post_init__(self):
        if min(self.weight, self.hidden) < 0 or self.temperature <= 0 or self.every < 1:
            raise ValueError(
                f"LwF needs weight >= 0, hidden >= 0, temperature > 0 and every >= 1, got weight={self.weight}, "
                f"hidden={self.hidden}, temperature={self.temperature}, every={self.every}"
            )

    def __repr__(self):  # as before there was `every`, so that runs begun then go on
        new = {"every": (self.every, 1), "mask_target": (self.mask_target, False), "hidden": (self.hidden, 0.0)}
        more = "".join(f", {name}={value}" for name, (value, default) in new.items() if value != default)
        return f"Lwf(weight={self.weight}, temperature={self.temperature}{more})"

    def check(self, mode, config):
        if mode != "incremental":
            raise ValueError(
                "LwF's teacher is the stack without the new adapter: use an incremental method, such as lwf"
            )

    def penalty(self, model, inputs, adapter, output):
        later = any(layer.configs[adapter].parent_adapters for _, layer in named_layers(model, adapter))
        if not (later and (self.weight or self.hidden)) or (self.step + 1) % self.every:
            return None
        labels, causal = inputs.get("labels"), is_causal(model)
        leave_out = {"num_items_in_batch", *(_FOR_A_LOSS if causal else ())}
        asked = {key: value for key, value in inputs.items() if key not in leave_out}
        now = output.get("logits")
        if now is None:
            now = model.base_model(**asked)["logits"]  # with its graph, and past the hook that has called this
        if labels is None and (now.ndim == 3 or self.mask_target):
            raise ValueError(
                "LwF compares answers where the labels are, and there are none: this trainer's rows have other answers "
                "(DPO's pairs). Leave LwF out: --strategy lwf.weight=0"
            )
        with without_adapter(model, adapter):
            before = model(**asked)["logits"]
        count = len(before)
        if now.ndim == 3:
            if causal:
                before, now, labels = before[:, :-1], now[:, :-1], labels[:, 1:]
            rows, columns = (labels != -100).nonzero(as_tuple=True)  # one wait for the device
            before, now, labels = before[rows, columns], now[rows, columns], labels[rows, columns]
            tokens = inputs.get("num_items_in_batch")
            count = len(now) if tokens is None else tokens
        before, now = before.float() / self.temperature, now.float() / self.temperature
        if self.mask_target:
            own = torch.arange(now.shape[-1], device=now.device) == labels[:, None]
            before, now = before.masked_fill(own, -torch.inf), now.masked_fill(own, -torch.inf)
        before, now = before.log_softmax(-1), now.log_softmax(-1)
        possible = before > -torch.inf  # answers that the model itself has closed
        divergence = before.exp() * (before - now).masked_fill(~possible, 0.0)
        penalty = self.weight * self.temperature**2 * divergence.sum() / count
        if self.hidden:
            penalty = penalty + self.hidden * _hidden_distance(model, adapter, asked)
        return self.every * penalty

    def memory_bytes(self, layers, tasks):
        """None are kept: what it compares with is computed in the step. With `hidden` that is a second graph of the
        whole model, which is not estimated."""
        return None if self.hidden else 0

    def logit_bytes(self, logits, width, tasks):
        """Both models' answers and their log-probabilities in float32."""
        return (24 + width) * logits if tasks else 0


def _hidden_distance(model: Any, adapter: str, asked: dict[str, Any]) -> torch.Tensor:
    """Mean squared distance of the last hidden states from those without the adapter, with its graph."""

    def last() -> torch.Tensor:
        output = model.base_model(**asked, output_hidden_states=True)  # past the hook that calls the penalty
        return (output.get("decoder_hidden_states") or output["hidden_states"])[-1].float()

    now = last()
    with without_adapter(model, adapter):
        before = last()
    decoder = model.get_base_model().config.is_encoder_decoder
    kept = asked["labels"] != -100 if decoder else asked.get("attention_mask", torch.ones_like(now[..., 0])).bool()
    return (now - before)[kept].square().mean()

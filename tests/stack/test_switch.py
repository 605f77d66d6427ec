"""Hot swap: the weights of any choice of tasks, bit for bit, there and back."""

import random

import pytest
import torch
import toy
from transformers import LlamaForCausalLM

from hf_jumplora import load_stack
from hf_jumplora.stack import switch_tasks
from hf_jumplora.tuner import named_layers


IDS = torch.tensor([[3, 12, 13, 8, 14, 9]])
NAMES = ["size", "light", "mood"]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def weights(model):
    return {name: layer.base_layer.weight.clone() for name, layer in named_layers(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switching_is_loading(dtype, toy_run, toy_base):
    """A random walk over choices: every time the bits of a fresh load, and the base comes back at the end."""
    model, rng = load_stack(toy_run.output_dir, dtype=dtype), random.Random(0)
    choices = [["light"], ["size", "mood"], None, ["mood"], ["mood", "light"]]
    fresh = [load_stack(toy_run.output_dir, tasks=choice, dtype=dtype) for choice in choices]
    for number in [*range(5), *(rng.randrange(5) for _ in range(10))]:
        switch_tasks(model, choices[number])
        found, expected = weights(model), weights(fresh[number])
        assert len(found) == 4
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
        assert torch.equal(logits(model), logits(fresh[number]))
    plain = LlamaForCausalLM.from_pretrained(toy_base, dtype=dtype)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), logits(fresh[number]))
    model.unmerge_adapter()
    assert all(torch.equal(weight, plain.get_submodule(name).weight) for name, weight in weights(model).items())


def test_live_after_unmerging(toy_run):
    """The tasks that act are the chosen ones, merged or not."""
    model = load_stack(toy_run.output_dir)
    switch_tasks(model, ["size", "mood"])
    merged = logits(model)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), merged, rtol=1e-5, atol=1e-5)
    switch_tasks(model, ["light"])
    assert torch.equal(logits(model), logits(load_stack(toy_run.output_dir, tasks=["light"])))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["sizes"], "has no task 'sizes'"),
        ("size", "names"),
        ([], "disable_adapter"),
        ({"size": 0.5}, "a blend: load_stack"),
    ],
)
def test_choices_that_cannot_be(tasks, message, toy_run):
    with pytest.raises(ValueError, match=message):
        switch_tasks(load_stack(toy_run.output_dir), tasks)


def test_models_that_cannot_switch(toy_run, toy_base):
    with pytest.raises(ValueError, match="needs a model from load_stack"):
        switch_tasks(load_stack(toy_run.output_dir, merge=True))
    with pytest.raises(ValueError, match="needs a model from load_stack"):
        switch_tasks(toy.load_base(toy_base))
    model = load_stack(toy_run.output_dir)
    switch_tasks(model, ["size"])
    with pytest.raises(ValueError, match=r"is now torch.bfloat16 .* first switched"):
        switch_tasks(model.to(torch.bfloat16), ["light"])

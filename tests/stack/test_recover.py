"""A stack of a pruned base on the whole one: the kept entries' updates bit for bit, zeros beside them."""

import pytest
import torch
import toy
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from hf_jumplora import load_stack
from hf_jumplora.cli import main
from hf_jumplora.schema import read_json
from hf_jumplora.stack import read_manifest, recover, verify_stack
from hf_jumplora.stack.operations import open_tasks, shared_entries
from hf_jumplora.stack.recover import _widened


HEADS, NEURONS = torch.tensor([0, 1]), torch.randperm(64, generator=torch.Generator().manual_seed(0))[:40]
QUERY, VALUE = torch.arange(16), torch.arange(8)  # two of four query heads, one of two value heads
TARGETS = ["q_proj", "v_proj", "down_proj"]


def pruned(base):
    """The whole toy base, and one with half of its heads and 40 of its 64 neurons in each layer."""
    whole = toy.load_base(base)
    small = toy.config()
    small.num_attention_heads, small.num_key_value_heads, small.intermediate_size, small.head_dim = 2, 1, 40, 8
    model, state, keep = LlamaForCausalLM(small), whole.state_dict(), {}
    for name in list(state):
        layer = name.removesuffix(".weight")
        last = layer.split(".")[-1]
        rows = {"q_proj": QUERY, "k_proj": VALUE, "v_proj": VALUE, "gate_proj": NEURONS, "up_proj": NEURONS}.get(last)
        columns = {"o_proj": QUERY, "down_proj": NEURONS}.get(last)
        for side, places in (("rows", rows), ("columns", columns)):
            if places is not None:
                state[name] = state[name].index_select(int(side == "columns"), places)
                if last in TARGETS:
                    keep[f"{layer}.{side}"] = places.clone()
    model.load_state_dict(state)
    return model, keep


@pytest.fixture(scope="module")
def trained(toy_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    model, keep = pruned(toy_base)
    model.save_pretrained(folder / "base")
    adapter = {"target_modules": TARGETS}
    toy.make_run(str(folder / "base"), folder / "stack", "jumplora", toy.tasks(2, 20, 1), adapter).train()
    save_file(keep, folder / "keep.safetensors")
    return folder, keep


def test_golden():
    """keep = {0, 2}, B = (1, 2), A = (1, -1): rows 0 and 2 of the whole update, nothing in row 1."""

    class Task:
        config = type("Config", (), {"gate": False})
        tensors = staticmethod(dict)
        factors = staticmethod(lambda layer: (torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0], [2.0]])))
        key = staticmethod(lambda layer, name: name)

    found = _widened(Task(), {"layer": (torch.tensor([0, 2]), torch.arange(2), 3, 2)}, {})
    assert (found["B"] @ found["A"]).tolist() == [[1, -1], [0, 0], [2, -2]]


def test_router_of_ranks():
    """It reads the layer's inputs, as A does: zeros at those that the pruned base had not."""

    class Task:
        config = type("Config", (), {"gate": False})
        tensors = staticmethod(lambda: {"router": torch.tensor([[3.0, 4.0]])})
        factors = staticmethod(lambda layer: (torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0], [2.0]])))
        key = staticmethod(lambda layer, name: name)

    found = _widened(Task(), {"layer": (torch.arange(2), torch.tensor([0, 2]), 2, 3)}, {})
    assert found["router"].tolist() == [[3, 0, 4]]
    assert found["A"].tolist() == [[1, 0, -1]]


def test_kept_entries_are_what_they_were(trained, toy_base, tmp_path, capsys):
    folder, keep = trained
    argv = ["recover", str(folder / "stack"), "--base_model", toy_base, "--keep", str(folder / "keep.safetensors")]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert f"size, light on {toy_base}" in capsys.readouterr().out
    verify_stack(tmp_path / "out")
    (_, _, before), (_, _, after) = open_tasks(folder / "stack"), open_tasks(tmp_path / "out")
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        for layer, shape in old.shapes.items():
            rows = keep.get(f"{layer}.rows", torch.arange(shape[0]))[:, None]
            columns = keep.get(f"{layer}.columns", torch.arange(shape[1]))
            update = new.update(layer)
            assert torch.equal(update[rows, columns], old.update(layer))
            update[rows, columns] = 0
            assert not update.any()
        shared, entries = shared_entries(after)
        info = read_json(tmp_path / "out" / new.folder / "task.json")
        assert info["density"] == pytest.approx(int(shared[number, number]) / entries)
        assert info["collision"] == pytest.approx([int(n) / entries for n in shared[number, :number]])
    ids = torch.tensor([[3, 12, 13, 8]])
    with torch.no_grad():  # the named base is loaded and checked
        logits, merged = (load_stack(tmp_path / "out", merge=merge).eval()(ids).logits for merge in (False, True))
        assert torch.equal(logits, merged)
        assert not torch.equal(logits, toy.load_base(toy_base).eval()(ids).logits)
    assert read_manifest(tmp_path / "out").base_model["layers"]["model.layers.0.self_attn.q_proj"] == [32, 32]


def test_refused(trained, toy_base, tmp_path, capsys):
    folder, keep = trained
    name = "model.layers.0.self_attn.q_proj.rows"
    rest = {key: places for key, places in keep.items() if key != name}
    wrong = {
        r"must hold 16 different places below 32, int64": [
            rest, {**keep, name: keep[name][:-1]}, {**keep, name: keep[name].int()},
            {**keep, name: torch.zeros(16, dtype=torch.int64)}, {**keep, name: keep[name] + 17},
        ],
        "is no LAYER.rows or LAYER.columns of an adapted layer": [{**keep, "lm_head.rows": keep[name]}],
    }  # fmt: skip
    for message, cases in wrong.items():
        for case in cases:
            with pytest.raises(ValueError, match=message):
                recover(folder / "stack", toy.load_base(toy_base), case, tmp_path / "out")
    shallow = toy.load_base(toy_base)
    del shallow.model.layers[1]
    with pytest.raises(ValueError, match="a pruned base has to keep its layers' names"):
        recover(folder / "stack", shallow, keep, tmp_path / "out")
    argv = ["recover", str(folder / "stack"), "--base_model", toy_base, "--out", str(tmp_path / "out"), "--keep"]
    assert main([*argv, str(folder / "none.safetensors")]) == 2
    assert "no safetensors file of the places" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

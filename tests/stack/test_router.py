"""Tasks that act on each prompt with weights of its own, and the router that learns which."""

import shutil

import pytest
import torch
import toy

from hf_jumplora import Task, load_stack
from hf_jumplora.data import Encoder
from hf_jumplora.stack import read_manifest, switch_tasks, verify_stack
from hf_jumplora.stack.router import Router, read_router, write_router
from hf_jumplora.trainer import scoring
from hf_jumplora.trainer.router import helpful_tasks, router_loss, row_losses, targets, train_router
from hf_jumplora.trainer.scoring import score_labels
from hf_jumplora.tuner import named_layers


IDS = torch.tensor([[3, 12, 13, 8, 14, 9], [4, 15, 16, 8, 17, 9]])


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def always(*weights):
    return lambda features: torch.tensor(weights).expand(len(features), -1)


@pytest.fixture(scope="module")
def plain(toy_base, tmp_path_factory):
    """Two tasks without gates."""
    run = toy.make_run(toy_base, tmp_path_factory.mktemp("plain"), "inclora", stream=toy.tasks(2, 8, 2))
    run.train()
    return run.output_dir


@pytest.fixture
def stack(toy_run, tmp_path):
    return shutil.copytree(toy_run.output_dir, tmp_path / "stack")


def test_golden():
    """The numbers of Brainstacks: base 2.0, a 1.5, b 1.7, both 1.495: b adds less than 0.01 to a."""
    loss = {(0, 0): 2.0, (1, 0): 1.5, (0, 1): 1.7, (1, 1): 1.495}

    def losses(weights, table=loss):
        return torch.tensor([table[tuple(row.int().tolist())] for row in weights])

    found = helpful_tasks(losses, 2, 2)
    assert found.tolist() == [[True, False]] * 2
    assert helpful_tasks(lambda w: losses(w, loss | {(1, 1): 1.4}), 1, 2).tolist() == [[True, True]]
    assert helpful_tasks(lambda w: losses(w, loss | {(0, 0): 1.2, (1, 1): 0.1}), 1, 2).tolist() == [[False, False]]
    torch.testing.assert_close(targets(found, torch.tensor([0, 1])), torch.tensor([[1.0, 0.0], [0.8, 0.2]]))
    p = torch.tensor([0.5, 0.9, 0.1, 0.7])
    margin = router_loss(p.logit(), p) - torch.nn.functional.binary_cross_entropy(p, p)
    assert float(margin) == pytest.approx(0.05 * (0.3 + 0.1) / 4, abs=1e-6)


def test_loss_of_a_row():
    """Of an answer's tokens in a causal model, of a class in a classifier; numbers are refused."""
    scores, labels = torch.randn(2, 4, 5), torch.tensor([[-100, -100, 3, 1], [-100, 2, -100, -100]])
    log_p = scores.log_softmax(-1)
    expected = torch.stack([-(log_p[0, 1, 3] + log_p[0, 2, 1]) / 2, -log_p[1, 0, 2]])
    torch.testing.assert_close(row_losses({"logits": scores}, labels, causal=True), expected)
    assert row_losses({"logits": scores[0]}, torch.tensor([0, 1, 2, 3]), False)[2] == -log_p[0, 2, 2]
    with pytest.raises(ValueError, match="no classes or tokens"):
        row_losses({"logits": scores[0]}, torch.tensor([0.5, 1.0, 2.0, 3.0]), False)


def test_a_model_of_the_caller_is_left_as_it_was(plain, toy_base, tmp_path):
    """After training a router on it, and after unloading it; a held-out task of the stream is no task of the stack."""
    folder, base = shutil.copytree(plain, tmp_path / "stack"), toy.load_base(toy_base)
    before = logits(base)
    held = toy.tasks(3, 4)[2]
    held.held_out = True
    train_router(folder, [*toy.tasks(2, 8), held], base, toy.tokenizer(), examples=4)
    assert torch.equal(logits(base), before)
    routed = load_stack(folder, base, route=always(1.0, 0.5))
    assert not torch.equal(logits(routed), before)
    assert torch.equal(logits(routed.unload()), before)
    routed = load_stack(folder, base, route="learned")
    assert logits(routed).shape == before.shape


def test_a_router_never_reads_the_answers(plain, toy_base, monkeypatch):
    """Without a cache a label is scored with its prompt, and the router would see both."""
    model = load_stack(plain, toy.load_base(toy_base), route=always(1.0, 0.5))
    encoder, task = Encoder(toy.tokenizer(), 32, seq2seq=False), toy.tasks(1)[0]
    prompts = [encoder.prompt_ids(task, row["sentence"]) for row in task.eval_dataset]
    assert len(score_labels(model, encoder, task, prompts)) == 8
    monkeypatch.setattr(scoring, "_score_on_cache", lambda *given: None)
    with pytest.raises(ValueError, match="eval_mode='generate', or without route="):
        score_labels(model, encoder, task, prompts)


@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_weights_are_those_of_a_blend(kind, toy_run, plain):
    """Every row is what the stack gives with its weights for all rows; without any it is the base, bit for bit."""
    folder, names = (toy_run.output_dir, ["size", "light", "mood"]) if kind == "gated" else (plain, ["size", "light"])
    wanted = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])[:, : len(names)]
    model = load_stack(folder, route=lambda features: wanted)
    routed = logits(model)
    with model.disable_adapter():
        assert torch.equal(routed[1], logits(model)[1])
    blend = {name: float(weight) for name, weight in zip(names, wanted[0], strict=True)}
    torch.testing.assert_close(routed[0], logits(load_stack(folder, tasks=blend))[0], rtol=1e-4, atol=1e-5)
    whole = logits(load_stack(folder, route=always(*[1.0] * len(names))))
    torch.testing.assert_close(whole, logits(load_stack(folder)), rtol=1e-4, atol=1e-5)


def test_answers_are_routed_by_their_prompts(plain):
    """Tokens from a cache keep the weights of their prompt, with several beams too."""
    mask = torch.ones_like(IDS)
    asked = []

    def choose(features):
        asked.append(len(features))
        return torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(len(features) // 2, 0)

    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    for beams in (1, 2):
        found = load_stack(plain, route=choose).generate(input_ids=IDS, num_beams=beams, **options)
        for row, name in enumerate(["size", "light"]):
            alone = load_stack(plain, tasks=[name]).generate(
                input_ids=IDS[row : row + 1], num_beams=beams, **{**options, "attention_mask": mask[:1]}
            )
            assert found[row, : alone.shape[1]].tolist() == alone[0].tolist()
    assert asked == [2, 4]


def test_encoder_and_decoder(tmp_path):
    """The encoder reads the prompt; the decoder has its weights, for all beams."""
    toy.save_base(tmp_path / "base", seq2seq=True)
    toy.make_run(str(tmp_path / "base"), tmp_path / "out", "inclora", stream=toy.tasks(2, 8, 2)).train()
    model = load_stack(tmp_path / "out", route=always(0.0, 1.0))
    alone = load_stack(tmp_path / "out", tasks=["light"])
    for beams in (1, 2):
        options = {"input_ids": IDS, "max_new_tokens": 3, "num_beams": beams, "do_sample": False}
        assert torch.equal(model.generate(**options), alone.generate(**options))
    answers = torch.tensor([[5, 6, 1], [6, 1, 0]])
    with torch.no_grad():
        found, expected = (m(input_ids=IDS, labels=answers).logits for m in (model, alone))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_trained_saved_and_loaded(stack, toy_base):
    """The router is part of the stack, sealed with it; what it gives is lower in loss than the base, and scored."""
    figures = train_router(stack, toy.tasks(), examples=8, batch_size=4)
    assert list(figures) == ["size", "light", "mood"]
    assert all(0 <= row["tasks"] <= 3 and row["routed"] < row["base"] for row in figures.values())
    router = read_router(stack, verify_stack(stack))
    assert router.weight.shape == (3, 64)
    assert logits(load_stack(stack, route="learned")).isfinite().all()
    some = load_stack(stack, toy_base, tasks=["mood"], route="learned")  # of a part of the tasks
    assert logits(some).isfinite().all()


def test_refused(stack, plain, toy_base, tmp_path):
    """By name, and before anything is loaded or trained."""
    with pytest.raises(ValueError, match="has no router: train one"):
        load_stack(stack, route="learned")
    for options in ({"merge": True}, {"tasks": {"size": 0.5}}):
        with pytest.raises(ValueError, match="neither merge=True nor fixed weights"):
            load_stack(stack, route="learned", **options)
    with pytest.raises(ValueError, match="route is 'learned', a function or None, got 'best'"):
        load_stack(stack, route="best")
    with pytest.raises(ValueError, match=r"trained on all its tasks, size, light, mood; got rows of size, light$"):
        train_router(stack, toy.tasks(2))
    plain_rows = [Task(task.name, [{"input_ids": [3]}], None) for task in toy.tasks()]
    with pytest.raises(ValueError, match="task 'size': a router needs rows with input_ids and labels"):
        train_router(stack, plain_rows)
    plain_rows[0].train_dataset = None
    with pytest.raises(ValueError, match="task 'size' has no training rows"):
        train_router(stack, plain_rows)
    hashes = {task["name"]: task["files"]["adapter_model.safetensors"] for task in read_manifest(stack).tasks}
    weight, bias = torch.zeros(3, 64), torch.zeros(3)
    with pytest.raises(ValueError, match="trained for size, light, mood and knows another task 'light'"):
        write_router(stack, Router(hashes | {"light": hashes["mood"]}, weight, bias))
    with pytest.raises(ValueError, match="trained for a and knows no task 'size'"):
        write_router(stack, Router({"a": "b"}, weight[:1], bias[:1]))
    write_router(stack, Router(hashes, weight, bias))
    shutil.copy(stack / "router.safetensors", plain / "router.safetensors")  # of another stack: not listed
    with pytest.raises(ValueError, match="has no router"):
        load_stack(plain, route="learned")
    (plain / "router.safetensors").unlink()
    (stack / "router.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"router.safetensors is damaged"):
        load_stack(stack, route="learned")


def test_a_routed_model_has_no_sum(plain):
    """Merging, switching and further adapters say so; rows that nobody weighted are an error."""
    model = load_stack(plain, route=always(1.0, 1.0))
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="routed: each prompt has weights of its own"):
            verb()
    with pytest.raises(ValueError, match="needs a model from load_stack"):
        switch_tasks(model, ["size"])
    with pytest.raises(ValueError, match="for another adapter load the stack without route="):
        model.add_adapter("more", model.peft_config["task_000"])
    layer = next(layer for _, layer in named_layers(model))
    logits(model)
    with pytest.raises(ValueError, match="gets 3 rows, and the tasks were weighted for 2 prompts"):
        layer(torch.zeros(3, 4, layer.in_features))
    with pytest.raises(ValueError, match="gets 8 rows"):  # tokens of all prompts in one list
        layer(torch.zeros(8, layer.in_features))
    for wrong in ((1.0,), (1.0, 1.0, 1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="finite ones for 2 prompts and 2 tasks"):
            logits(load_stack(plain, route=always(*wrong)))
    with pytest.raises(ValueError, match="call the model with input_ids"):
        model(inputs_embeds=torch.zeros(2, 3, 32))

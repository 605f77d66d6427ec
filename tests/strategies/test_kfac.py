"""The Kronecker-factored penalty: its factors by definition, its gradient, what it prevents, what it remembers."""

import pytest
import torch
import toy
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from hf_jumplora import JumpLoraConfig, finish_adapter
from hf_jumplora.strategies import KFac
from hf_jumplora.strategies.moments import _cholesky, _test_matrix, batches, joined_roots, kronecker_factors, roots
from hf_jumplora.tuner import named_layers, set_mix, set_threshold


def peft_model(base, targets=("q_proj", "v_proj"), **options):
    torch.manual_seed(3)
    config = JumpLoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_weights=False, **options)
    return get_peft_model(base, config)


def token_examples(seq2seq, count=7):
    """Examples of several lengths, with an answer of one to three tokens at the end."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        ids = torch.randint(3, 30, (1, 6 + i % 3), generator=generator)
        answer = torch.randint(3, 30, (1, 1 + i % 3), generator=generator)
        labels = answer
        if not seq2seq:
            labels = ids.clone()
            labels[:, : -answer.shape[1]] = -100
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Classifier(nn.Module):
    """Mean of token embeddings, two layers, logits of three classes."""

    def __init__(self, words=30, width=6):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.q_proj, self.v_proj = nn.Embedding(words, width), nn.Linear(width, 5), nn.Linear(5, 3)
        self.config = None

    def forward(self, input_ids, attention_mask, labels=None):
        weights = (attention_mask / attention_mask.sum(1, keepdim=True))[..., None]
        return {"logits": 2 * self.v_proj((torch.tanh(self.q_proj(self.embed(input_ids))) * weights).sum(1))}


def by_definition(model, examples, shift):
    """One example and one layer output at a time, in plain autograd; the label drawn is the likeliest."""
    layers = dict(named_layers(model, "default"))
    G = {name: torch.zeros(layer.out_features, layer.out_features) for name, layer in layers.items()}
    C = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}
    tokens, examples = dict.fromkeys(layers, 0), list(examples)
    for example in examples:
        kept, handles = {}, []
        for name, layer in layers.items():

            def hook(module, args, output, name=name, kept=kept):
                kept[name] = (args[0].detach(), output)

            handles.append(layer.register_forward_hook(hook))
        logits = model(**example)["logits"]
        for handle in handles:
            handle.remove()
        if logits.ndim == 3:
            labels = example["labels"][:, 1:] if shift else example["labels"]
            logits = (logits[:, :-1] if shift else logits)[labels != -100]
        likelihood = logits.log_softmax(-1).max(-1).values.sum()
        gradients = torch.autograd.grad(likelihood, [y for _, y in kept.values()], allow_unused=True)
        for (name, (x, _)), g in zip(kept.items(), gradients, strict=True):
            for token in x.reshape(-1, x.shape[-1]):
                C[name] += torch.outer(token, token)
                tokens[name] += 1
            for token in g.reshape(-1, g.shape[-1]):
                G[name] += torch.outer(token, token) / len(examples)
    return G, {name: c / tokens[name] for name, c in C.items()}


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "classifier"])
def test_factors_by_definition(kind, toy_base, toy_t5, relative_error, monkeypatch):
    """Also: nothing of the model is changed, and neither gradients nor random numbers are touched."""
    most_likely = lambda reached, share, right: reached.diff(prepend=0 * reached[:, :1]).argmax(-1, keepdim=True)  # noqa: E731
    monkeypatch.setattr(torch, "searchsorted", most_likely)
    base = {
        "causal": lambda: toy.load_base(toy_base),
        "seq2seq": lambda: toy.load_base(toy_t5),
        "classifier": Classifier,
    }
    model = peft_model(base[kind](), ("q", "v") if kind == "seq2seq" else ("q_proj", "v_proj"), gate=False).eval()
    examples = list(token_examples(kind == "seq2seq"))
    expected = by_definition(model, examples, kind == "causal")
    state = torch.get_rng_state()
    found = kronecker_factors(model.train(), "default", examples, 0, tokens=16)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert theirs[name].abs().sum() > 0
            assert relative_error(ours[name], theirs[name]) < 1e-5


def test_padding_is_no_token(toy_base, relative_error):
    """An example padded to another length gives the same factors: means are over the tokens that are there."""
    model = peft_model(toy.load_base(toy_base), gate=False).eval()
    examples = list(token_examples(False))
    padded = [{key: nn.functional.pad(value, (0, 5), value=-100 if key == "labels" else 0) for key, value in e.items()}
              for e in examples]  # fmt: skip
    found, expected = (kronecker_factors(model, "default", e, 0, 1) for e in (padded, examples))
    for ours, theirs in zip(found, expected, strict=True):
        for name in theirs:
            assert relative_error(ours[name], theirs[name]) < 1e-4


def test_labels_are_drawn_from_the_model():
    """Over many draws G of one example is sum_c p(c) g_c g_c^T: the Fisher matrix, not the empirical one."""
    model = peft_model(Classifier(), gate=False).eval()
    example = next(token_examples(False))
    example = {"input_ids": example["input_ids"], "attention_mask": example["attention_mask"]}
    G, _ = kronecker_factors(model, "default", [example] * 20000, 0, tokens=10000)
    p = model(**example)["logits"].softmax(-1)[0]
    expected = torch.zeros(3, 3)
    for c in range(3):
        g = 2 * (torch.eye(3)[c] - p)  # of log p(c) at the last layer's output
        expected += p[c] * torch.outer(g, g)
    name = next(name for name in G if "v_proj" in name)
    torch.testing.assert_close(G[name], expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("rank", "excess"), [(10, 1.05), (48, 1.001)])
def test_sketched_factors(rank, excess):
    """Roots made from the stream of tokens, against the best ones of this rank; 4 k + 8 >= 200: no sketch is cut."""
    base = Classifier(400, 200)
    base.embed.weight.data *= torch.arange(1, 201.0) ** -1.0
    model = peft_model(base, gate=False).eval()
    words = torch.arange(400).reshape(80, 1, 5)
    examples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in words]
    whole = kronecker_factors(model, "default", examples, 0)
    roots = kronecker_factors(model, "default", examples, 0, rank=rank)
    for exact, found in zip(whole, roots, strict=True):
        for name, matrix in exact.items():
            root = found[name]
            assert root.shape == (len(matrix), min(rank, len(matrix)))
            rest = torch.linalg.eigvalsh(matrix)[:-rank].norm()  # what no matrix of this rank can hold
            assert (matrix - root @ root.T).norm() <= excess * rest + 1e-5 * matrix.norm()


def test_batches_hold_as_many_tokens_as_they_may():
    """Sorted by length and padded: every example once, no batch above the limit, few batches."""
    examples = list(token_examples(False, 40))
    found = list(batches(examples, 32))
    assert sorted(number for batch in found for number in batch.numbers) == list(range(40))
    assert sum(batch.inputs["input_ids"].sum() for batch in found) == sum(e["input_ids"].sum() for e in examples)
    total = sum(e["input_ids"].numel() for e in examples)
    assert all(batch.inputs["input_ids"].numel() <= 32 for batch in found)
    assert len(found) <= 1.5 * total / 32 + 1
    assert sum(int(batch.masks[0].sum()) for batch in found) == total
    assert all((batch.inputs["labels"][batch.masks[0] == 0] == -100).all() for batch in found)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_factors_do_not_depend_on_the_batches(kind, toy_base, toy_t5, relative_error):
    """One example at a time, or all padded into one: the same labels are drawn, and the same factors result."""
    base = toy.load_base(toy_t5 if kind == "seq2seq" else toy_base)
    model = peft_model(base, ("q", "v") if kind == "seq2seq" else ("q_proj", "v_proj"), gate=False).eval()
    examples = list(token_examples(kind == "seq2seq", 12))
    single, whole = (kronecker_factors(model, "default", examples, 3, tokens=n) for n in (1, 10**6))
    other = kronecker_factors(model, "default", examples, 4, tokens=1)
    for ours, theirs in zip(whole, single, strict=True):
        assert all(relative_error(ours[name], theirs[name]) < 1e-4 for name in theirs if theirs[name].any())
    assert any(relative_error(other[0][name], single[0][name]) > 1e-2 for name in single[0])


@pytest.mark.parametrize("pad_token", [0, 2])
def test_a_classifier_reads_the_last_token_that_is_no_padding(pad_token, relative_error):
    """It looks for its config's pad token, not at the mask: another one as padding would be read as the text's end."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=30, num_labels=3, pad_token_id=pad_token, **sizes)
    model = peft_model(LlamaForSequenceClassification(config), gate=False).eval()
    examples = [{**example, "labels": torch.tensor([i % 3])} for i, example in enumerate(token_examples(False))]
    single, whole = (kronecker_factors(model, "default", examples, 0, tokens=n) for n in (1, 10**6))
    for ours, theirs in zip(whole, single, strict=True):
        assert all(relative_error(ours[name], theirs[name]) < 1e-5 for name in theirs)


def test_what_cannot_be_joined_passes_as_it_is():
    """Values that are no tensors, of an encoder-decoder model too."""
    example = {**next(token_examples(True)), "names": ["a"]}
    (found,) = batches([example], 16, seq2seq=True)
    assert found.inputs is example
    assert found.masks[0] is example["attention_mask"]


def test_roots_are_those_of_a_singular_value_decomposition():
    """Of a full matrix, one of lower rank than asked for, and zeros, in one call; and joined to other roots."""
    rank, d = 6, 80
    torch.manual_seed(0)
    factors = torch.randn(3, d, d, dtype=torch.float64) * 0.8 ** torch.arange(d)
    factors[1, :, 4:], factors[2] = 0, 0
    M, T = factors @ factors.mT, _test_matrix(d, rank, torch.device("cpu")).double()
    found = roots(M @ T, rank)
    for root, matrix in zip(found, M, strict=True):
        shift = torch.finfo(torch.float32).eps * (matrix @ T).norm()
        Y = matrix @ T + shift * T
        if not matrix.any():
            assert not root.any()
            continue
        lower = torch.linalg.cholesky(T.T @ Y + shift * torch.eye(T.shape[1]))
        U, sigma, _ = torch.linalg.svd(Y @ torch.linalg.inv(lower).T, full_matrices=False)
        expected = (U * (sigma.square() - shift).clamp_min(0))[:, :rank] @ U[:, :rank].T
        assert (root @ root.T - expected).norm() <= 1e-9 * expected.norm()
    both = joined_roots(found, found.flip(0), rank)
    for root, old, new in zip(both, found, found.flip(0), strict=True):
        assert (root @ root.T - cut(old @ old.T + new @ new.T)).norm() <= 1e-9 * (old.norm() + new.norm()) ** 2


def test_a_core_that_rounding_made_indefinite_gets_a_larger_shift():
    """Of any matrix of the shape, for all of them alike."""
    shift = torch.full((2, 1, 1), 1e-3, dtype=torch.float64)
    core = torch.diag_embed(torch.tensor([[1.0, 1.0], [1.0, -3e-3]], dtype=torch.float64))
    lower = _cholesky(core, shift)
    torch.testing.assert_close(lower @ lower.mT, core + 10 * shift * torch.eye(2))
    with pytest.raises(torch.linalg.LinAlgError):
        _cholesky(core - 2 * torch.eye(2), shift)


def test_layers_that_share_an_input_share_its_moments(toy_base):
    """q and v: one tensor in memory and one on disk, and a state of before, with every C, loads as it was."""
    model = peft_model(toy.load_base(toy_base), gate=False).eval()
    kfac = KFac(memory=4)
    kfac.on_task_end(model, "default", lambda count, rows=None: token_examples(False, count))
    kfac.on_task_end(model, "default", lambda count, rows=None: token_examples(False, count))
    assert len(kfac.C) == 2 * len({id(C) for C in kfac.C.values()})
    state = kfac.state_dict()
    assert sum(key.startswith("C.") for key in state) == len(kfac.C) // 2
    before = {key: value for key, value in state.items() if not key.startswith("C")}
    before |= {f"C.{name}": C.clone() for name, C in kfac.C.items()}
    for saved in (state, before):
        loaded = KFac(memory=4)
        loaded.load_state_dict(saved)
        assert loaded.C.keys() == kfac.C.keys()
        assert all(torch.equal(loaded.C[name], C) for name, C in kfac.C.items())
        assert loaded.tasks == 2


def test_curvature_costs_batches_and_shapes_not_examples_and_layers(toy_base):
    """Operations and waits for 16 examples and for 64 in one batch each; decompositions for two shapes of layers."""
    from counting import Count

    model = peft_model(toy.load_base(toy_base), gate=False).eval()
    counts = []
    for number in (16, 64):
        examples = list(token_examples(False, number))
        with Count() as count:
            kronecker_factors(model, "default", examples, 0, tokens=10**6, rank=4)
        counts.append(count)
    drawn = counts[1].by_name["rand"] - counts[0].by_name["rand"]  # on the CPU, whatever the model's device
    assert counts[1].operations - counts[0].operations == drawn == 64 - 16
    assert counts[0].waits.total() == counts[1].waits.total() <= 3 + 3  # of the batch; of three shapes of matrices
    assert counts[1].by_name["_linalg_eigh"] <= 4
    assert counts[1].by_name["_linalg_svd"] == 0


def stacked(base, gated, strategy, tasks=2):
    """A model whose `tasks` tasks are remembered, and a new adapter on top."""
    model = peft_model(base, gate=gated)
    examples = lambda count, rows=None: token_examples(False, count)  # noqa: E731
    for k in range(tasks):
        if gated:
            set_threshold(model, "default", 0.2)
            set_mix(model, "default", 1.0)
        strategy.on_task_start(model, "default", examples)
        strategy.on_task_end(model, "default", lambda count, rows=None, k=k: examples(3 + 4 * k))
        finish_adapter(model, "default", f"task_00{k}")
        parents = [f"task_00{i}" for i in range(k + 1)]
        torch.manual_seed(10 + k)
        options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
        model.add_adapter("default", JumpLoraConfig(parent_adapters=parents, gate=gated, **options))
        model.set_adapter("default")
    if gated:
        set_threshold(model, "default", 0.3)
        set_mix(model, "default", 0.6)
    strategy.on_task_start(model, "default", examples)
    return model


def cut(matrix, rank=6):
    """The best approximation of this rank."""
    U, sigma, V = torch.linalg.svd(matrix)
    return U[:, :rank] * sigma[:rank] @ V[:rank]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("memory", ["per_task", "sum", 6])
def test_penalty_by_hand(gated, memory, toy_base, relative_error):
    kfac, exact = KFac(7.0, memory), KFac(7.0)
    model = stacked(toy.load_base(toy_base), gated, kfac)
    stacked(toy.load_base(toy_base), gated, exact)
    expected = 0.0
    for name, layer in named_layers(model):
        update, G, C = layer.update("default"), exact.G[name], exact.C[name]
        assert G.shape[0] == 2
        if memory == 6:
            G, C = (torch.stack([cut(task) for task in t]) for t in (G, C))
        if memory != "per_task":
            G, C = G.sum(0)[None], C.mean(0)[None]
        if memory == 6:
            G, C = cut(G[0])[None], cut(C[0])[None]
        expected += sum(torch.trace(g @ update @ c @ update.T) for g, c in zip(G, C, strict=True))
    penalty = kfac.penalty(model, {}, "default", {})
    assert relative_error(penalty, 7 * expected) < (0.02 if memory == 6 else 1e-5)  # 6: from a sketch
    penalty.backward()
    for _, layer in named_layers(model):
        assert layer.jumplora_A["default"].grad.abs().sum() > 0
        assert not gated or layer.jumplora_gate["default"].log_tau.grad is None


@pytest.mark.parametrize(("memory", "sizes"), [("per_task", (2, 32)), ("sum", (1, 32)), (5, (1, 5))])
def test_memory(memory, sizes, toy_base):
    """Its size, and that it survives a restart bit for bit."""
    kfac, again = KFac(1.0, memory), KFac(1.0, memory)
    model = stacked(toy.load_base(toy_base), False, kfac)
    state = kfac.state_dict()
    again.load_state_dict({key: value.clone() for key, value in state.items()})
    again.on_task_start(model, "default", None)
    assert torch.equal(kfac.penalty(model, {}, "default", {}), again.penalty(model, {}, "default", {}))
    for name, layer in named_layers(model):
        assert again.C[name].shape == (sizes[0], layer.in_features, sizes[1])
    kfac.on_task_end(model, "default", lambda count: token_examples(False, 3))
    again.on_task_end(model, "default", lambda count: token_examples(False, 3))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in kfac.state_dict().items())


def test_text_of_no_task_is_the_zeroth_task(toy_base, tmp_path):
    """In the first task there is a penalty already, and only then are the texts used."""
    kfac = KFac(1.0, general=["the very new cat", "ant : bee"])
    run = toy.make_run(toy_base, tmp_path, "inclora", stream=toy.tasks(2))
    run.plan.strategies[:] = [kfac]
    run.train()
    assert kfac.tasks == 3
    with pytest.raises(ValueError, match="no example"):
        KFac(general=[]).on_task_start(run.model, "task_001", lambda count, rows=None: iter(rows))


@pytest.mark.parametrize("method", ["kfac", "jumplora-kfac"])
def test_forgets_less(method, toy_base, tmp_path):
    """The first task's answers move less in the second task than without the penalty; most of them are kept."""
    change = {}
    for weight in (0.0, 100.0):
        run = toy.make_run(toy_base, tmp_path / str(weight), method, stream=toy.tasks(2), num_train_epochs=2)
        run.plan.strategies[:] = [KFac(weight)]
        rows = run.plan.encoder.train_rows(run.plan.tasks[0])
        logits = []
        evaluate = run.evaluator.row

        def measured(model, *seen, rows=rows, logits=logits, evaluate=evaluate):
            with torch.no_grad():
                answers = [model.eval()(torch.tensor([row["input_ids"]])).logits[0, -3] for row in rows]
            logits.append(torch.stack(answers).log_softmax(-1))
            return evaluate(model, *seen)

        run.evaluator.row = measured
        run.train()
        _, first, second = logits
        change[weight] = (first.exp() * (first - second)).sum(-1).mean().item()  # KL
    assert change[100.0] < 0.3 * change[0.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": -1}, "must not be negative"),
        ({"memory": "all"}, "memory is"),
        ({"memory": 0}, "memory is"),
        ({"examples": 0}, "examples must be positive"),
    ],
)
def test_bad_values(options, words):
    with pytest.raises(ValueError, match=words):
        KFac(**options)


def test_sequential_is_refused():
    with pytest.raises(ValueError, match="use an incremental method"):
        KFac().check("sequential", None)

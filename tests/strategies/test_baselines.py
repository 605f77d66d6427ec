"""olora, nlora, drift, l2, ewc, lwf, replay: each by its formula in float64, restarted, and refused where it must."""

from types import SimpleNamespace

import pytest
import torch
import toy
from datasets import Dataset
from peft import get_peft_model

from hf_jumplora import JumpLoraConfig, finish_adapter
from hf_jumplora.methods import get_method
from hf_jumplora.strategies import L2, Drift, Ewc, Lwf, NLora, OLora, Replay
from hf_jumplora.tuner import named_layers, set_mix, set_threshold, without_adapter


def texts(count, rows=None):
    """Examples of one length, whose last two tokens are the answer."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(3, 30, (1, 6), generator=generator)
        labels = torch.cat([torch.full((1, 4), -100), ids[:, 4:]], 1)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def after_two_tasks(base, strategy, gate=False, targets=("q_proj", "o_proj")):
    """A model that learned two tasks, and a third adapter in training."""
    options = {"r": 2, "lora_alpha": 8, "target_modules": list(targets), "gate": gate, "init_weights": False}
    torch.manual_seed(5)
    model = get_peft_model(toy.load_base(base), JumpLoraConfig(**options))
    for k in range(2):
        strategy.on_task_start(model, "default", texts)
        if gate:
            set_threshold(model, "default", 0.3)
            set_mix(model, "default", 1.0)
        strategy.on_task_end(model, "default", texts)
        finish_adapter(model, "default", f"task_00{k}")
        parents = [f"task_00{i}" for i in range(k + 1)]
        model.add_adapter("default", JumpLoraConfig(parent_adapters=parents, **options))
        model.set_adapter("default")
    if gate:
        set_threshold(model, "default", 0.3)
        set_mix(model, "default", 0.5)
    strategy.on_task_start(model, "default", texts)
    return model


def compare(model, penalty, formula, relative_error):
    """The penalty and its gradients with those of `formula(layer, A, B)`, summed over layers, in float64."""
    penalty.backward()
    expected = torch.zeros((), dtype=torch.float64)
    for _, layer in named_layers(model):
        A, B = (p["default"].detach().double().requires_grad_() for p in (layer.jumplora_A, layer.jumplora_B))
        term = formula(layer, A, B)
        for ours, theirs in zip(
            (layer.jumplora_A, layer.jumplora_B), torch.autograd.grad(term, [A, B], allow_unused=True), strict=True
        ):
            if theirs is not None:
                assert theirs.abs().sum() > 0
                assert relative_error(ours["default"].grad, theirs) < 1e-5
        expected += term.detach()
    assert relative_error(penalty, expected) < 1e-5


def gated_update(layer, A, B, gate):
    """E in float64, its mask a constant."""
    D = B @ A
    if not gate:
        return D
    tau = layer.gate("default").log_tau.detach().double().exp()
    return 0.5 * D + 0.5 * D * (D.abs() > tau)


def test_olora(toy_base, relative_error):
    olora = OLora(0.7, 0.2)
    model = after_two_tasks(toy_base, olora)

    def formula(layer, A, B):
        past = torch.cat([layer.jumplora_A[f"task_00{k}"] for k in range(2)]).double()
        return 0.7 * (past @ A.T).abs().sum() + 0.2 * (A.norm() + B.norm())

    compare(model, olora.penalty(model, {}, "default", {}), formula, relative_error)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("l1", ["delta", "released"])
def test_nlora(l1, gate, toy_base, relative_error):
    nlora = NLora(0.4, l1)
    if l1 == "released" and gate:
        with pytest.raises(ValueError, match="use l1='delta' with a gate"):
            nlora.check("incremental", SimpleNamespace(gate=True))
        return
    model = after_two_tasks(toy_base, nlora, gate)

    def formula(layer, A, B):
        return 0.4 * ((A @ B) if l1 == "released" else gated_update(layer, A, B, gate)).abs().sum()

    compare(model, nlora.penalty(model, {}, "default", {}), formula, relative_error)
    assert all(g.log_tau.grad is None for _, layer in named_layers(model) for g in layer.jumplora_gate.values())


def test_nlora_as_released_needs_square_layers(toy_base):
    with pytest.raises(ValueError, match=r"k_proj \(16 x 32, not square\).*use l1='delta'"):
        after_two_tasks(toy_base, NLora(l1="released"), targets=["q_proj", "k_proj"])


@pytest.mark.parametrize("gate", [False, True])
def test_drift(gate, toy_base, relative_error):
    """weight * the expected squared change of the outputs, over both earlier tasks."""
    drift = Drift(3.0, examples=5)
    model = after_two_tasks(toy_base, drift, gate)
    inputs = {name: [] for name, _ in named_layers(model)}
    for number in range(2):  # the model as it was after each task
        handles = [
            layer.register_forward_pre_hook(lambda m, args, name=name: inputs[name].append(args[0].flatten(0, -2)))
            for name, layer in named_layers(model)
        ]
        model.base_model.set_adapter(f"task_00{number}", inference_mode=True)
        with torch.no_grad():
            for example in texts(5):
                model(**example)
        for handle in handles:
            handle.remove()
    model.base_model.set_adapter("default")

    def formula(layer, A, B):
        x = torch.cat(inputs[layer.layer_name]).double()
        change = 4 * x @ gated_update(layer, A, B, gate).T
        return 3 * change.square().sum(1).mean()

    compare(model, drift.penalty(model, {}, "default", {}), formula, relative_error)


def sequential(base, strategy):
    """One adapter after two tasks, and moved on in the third."""
    torch.manual_seed(5)
    config = JumpLoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], gate=False, init_weights=False)
    model = get_peft_model(toy.load_base(base), config)
    for _ in range(2):
        strategy.on_task_start(model, "default", texts)
        strategy.on_task_end(model, "default", texts)
        for _, layer in named_layers(model):
            layer.jumplora_A["default"].data += 0.1 * torch.randn(2, 32)
    strategy.on_task_start(model, "default", texts)
    before = {
        n: (la.jumplora_A["default"].double().detach(), la.jumplora_B["default"].double().detach())
        for n, la in named_layers(model)
    }
    for _, layer in named_layers(model):
        layer.jumplora_A["default"].data += torch.randn(2, 32)
        layer.jumplora_B["default"].data += torch.randn(32, 2)
    return model, before


def test_l2(toy_base, relative_error):
    l2 = L2(0.6)
    model, before = sequential(toy_base, l2)

    def formula(layer, A, B):
        a, b = before[layer.layer_name]
        return 0.3 * ((A - a).square().sum() + (B - b).square().sum())

    compare(model, l2.penalty(model, {}, "default", {}), formula, relative_error)
    assert L2().penalty(model, {}, "default", {}) is None


def test_ewc(toy_base, relative_error, monkeypatch):
    """F by definition, one example at a time (the label drawn is the likeliest); the penalty by its formula."""
    most_likely = lambda reached, share, right: reached.diff(prepend=0 * reached[:, :1]).argmax(-1, keepdim=True)  # noqa: E731
    monkeypatch.setattr(torch, "searchsorted", most_likely)
    once = Ewc(examples=4)
    torch.manual_seed(5)
    config = JumpLoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], gate=False, init_weights=False)
    model = get_peft_model(toy.load_base(toy_base), config)
    once.on_task_end(model, "default", texts)
    parameters = dict(once.parameters(model, "default"))
    expected = dict.fromkeys(parameters, 0.0)
    for example in texts(4):
        logits = model.eval()(**example).logits[0, 3:5]
        likelihood = logits.log_softmax(-1).max(-1).values.sum()
        for name, grad in zip(parameters, torch.autograd.grad(likelihood, parameters.values()), strict=True):
            expected[name] = expected[name] + grad.square() / 4
    for name, value in expected.items():
        assert value.sum() > 0
        assert relative_error(once.F[name], value) < 1e-5

    ewc = Ewc(5.0, decay=0.5, examples=4)
    model, before = sequential(toy_base, ewc)

    def formula(layer, A, B):
        terms = zip("AB", (A, B), before[layer.layer_name], strict=True)
        return 2.5 * sum((ewc.F[f"{layer.layer_name}.{k}"].double() * (p - old).square()).sum() for k, p, old in terms)

    compare(model, ewc.penalty(model, {}, "default", {}), formula, relative_error)
    F = dict(ewc.F)
    ewc.on_task_end(model, "default", texts)
    fresh = Ewc(examples=4)
    fresh.tasks = 2  # another draw of labels
    fresh.on_task_end(model, "default", texts)
    for name in F:
        torch.testing.assert_close(ewc.F[name], 0.5 * F[name] + fresh.F[name])


@pytest.mark.parametrize("base", ["toy_base", "toy_t5"])
def test_lwf(base, request, relative_error):
    """KL to the stack without the new adapter over the answer tokens; nothing in the first task."""
    lwf = Lwf(0.5, 3.0)
    causal = base == "toy_base"
    targets = ["q_proj", "o_proj"] if causal else ["q", "o"]
    model = after_two_tasks(request.getfixturevalue(base), lwf, targets=targets).train()
    examples = list(texts(3))
    batch = {key: torch.cat([e[key] for e in examples]) for key in examples[0]}
    output = model(**batch)
    penalty = lwf.penalty(model, batch, "default", output)
    assert model.training
    with without_adapter(model, "default"):
        before = model(**batch).logits.double()
    now, labels = output.logits.detach().double(), batch["labels"]
    if causal:
        before, now, labels = before[:, :-1], now[:, :-1], labels[:, 1:]
    p, q = ((t[labels != -100] / 3).softmax(-1) for t in (before, now))
    assert len(p) == 6
    assert relative_error(penalty, 0.5 * 9 * (p * (p / q).log()).sum() / 6) < 1e-4
    rest = torch.nn.functional.one_hot(labels[labels != -100], p.shape[-1]) == 0
    p, q = (t[rest].view(6, -1) / t[rest].view(6, -1).sum(-1, keepdim=True) for t in (p, q))
    masked = Lwf(0.5, 3.0, mask_target=True).penalty(model, batch, "default", output)
    assert relative_error(masked, 0.5 * 9 * (p * (p / q).log()).sum() / 6) < 1e-4
    (penalty + masked).backward()
    assert all(layer.jumplora_A["default"].grad.abs().sum() > 0 for _, layer in named_layers(model))
    assert all(layer.jumplora_A["default"].grad.isfinite().all() for _, layer in named_layers(model))
    output = model(**batch)
    features = Lwf(0.0, hidden=2.0).penalty(model, batch, "default", output)

    def states():
        out = model(**batch, output_hidden_states=True)
        return (out.get("decoder_hidden_states") or out["hidden_states"])[-1]

    change = states()
    with without_adapter(model, "default"):
        change = change - states()
    kept = batch["attention_mask"].bool() if causal else batch["labels"] != -100
    torch.testing.assert_close(features, 2 * change[kept].square().mean())
    grads = torch.autograd.grad(features, [layer.jumplora_A["default"] for _, layer in named_layers(model)])
    assert all(grad.any() for grad in grads[:2])
    batch["num_items_in_batch"] = 12  # of a micro-batch on average; this one has 6
    torch.testing.assert_close(lwf.penalty(model, batch, "default", output), penalty / 2)
    seldom = Lwf(0.5, 3.0, every=3)
    found = []
    for seldom.step in range(4):
        found.append(seldom.penalty(model, batch, "default", output))
    assert found[:2] == [None, None]
    assert found[3] is None
    torch.testing.assert_close(found[2], 3 * penalty / 2)
    assert Lwf(0.0).penalty(model, batch, "default", output) is None
    assert repr(Lwf()) == "Lwf(weight=1.0, temperature=2.0)"
    assert repr(Lwf(every=3, mask_target=True))[-28:] == ", every=3, mask_target=True)"
    no_labels = {key: value for key, value in batch.items() if key != "labels"}
    with pytest.raises(ValueError, match=r"lwf\.weight=0"):
        Lwf(mask_target=True).penalty(model, no_labels, "default", {"logits": output.logits[:, 0]})
    first = get_peft_model(toy.load_base(request.getfixturevalue(base)), JumpLoraConfig(r=2, target_modules=targets))
    assert lwf.penalty(first, batch, "default", output) is None


def test_lwf_with_closed_answers(toy_base):
    """Answers at minus infinity, as in a classifier with candidates, count nothing instead of making a NaN."""
    lwf = Lwf(1.0, 1.0)
    model = after_two_tasks(toy_base, lwf)
    before = torch.tensor([[1.0, -torch.inf, 0.0]])
    model.forward = lambda **inputs: {"logits": before}
    now = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    penalty = lwf.penalty(model, {}, "default", {"logits": now})
    p = before.softmax(-1)[0, [0, 2]]
    torch.testing.assert_close(penalty, (p * (2 * p).log()).sum())
    penalty.backward()
    assert torch.isfinite(now.grad).all()


def test_replay_per_task(toy_base, tmp_path):
    """A quarter of each earlier task, the same rows in both later tasks, in the stream of a run."""
    replay = Replay(0.25, seed=3)
    sets = [Dataset.from_dict({"x": [100 * k + i for i in range(size)]}) for k, size in enumerate([8, 12, 4])]
    mixed = [replay.training_data(sets[k], k, sets[:k])["x"] for k in range(3)]
    assert mixed[0] == list(range(8))
    assert len(mixed[1]) == 12 + 2
    assert len(mixed[2]) == 4 + 2 + 3
    assert mixed[2][:4] == [200, 201, 202, 203]
    assert mixed[1][12:] == mixed[2][4:6]
    assert all(x < 8 for x in mixed[1][12:])
    assert len(set(mixed[2])) == 9
    run = toy.make_run(toy_base, tmp_path, "seqlora", stream=toy.tasks(2))
    run.plan.strategies[:] = [replay]
    run.train()
    assert [info["steps"] for info in run.record.trained] == [8, 10]


def test_replay_reservoir():
    """A memory of fixed size in which every earlier example is equally likely."""
    replay = Replay(reservoir=6)
    assert [len(rows) for rows in replay.memory([4])] == [4]
    kept = replay.memory([10, 20])
    assert sum(map(len, kept)) == 6
    assert replay.memory([10, 20]) == kept
    counts = torch.zeros(30)
    for seed in range(2000):
        for task, rows in enumerate(Replay(reservoir=6, seed=seed).memory([10, 20])):
            assert len(set(rows)) == len(rows)
            for i in rows:
                counts[10 * task + i] += 1
    assert counts.min() > 320  # expected 400, standard deviation 18
    assert counts.max() < 480


def test_replay_of_any_data_set():
    mixed = Replay(0.5).training_data(["a"], 1, [["b", "c", "d", "e"]])
    assert mixed[0] == "a"
    assert len(mixed) == 3
    assert {mixed[1], mixed[2]} < {"b", "c", "d", "e"}
    with pytest.raises(ValueError, match="task number 1 is not at hand"):
        Replay().training_data(["a"], 2, [["b"], None])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OLora(-1), "lambda1 and lambda2 must not be negative"),
        (lambda: NLora(-1), "must not be negative"),
        (lambda: NLora(l1="both"), "'delta'.*or 'released'"),
        (lambda: Drift(-1), "must not be negative"),
        (lambda: Drift(examples=0), "examples must be positive"),
        (lambda: L2(-1), "L2's penalty must not be negative"),
        (lambda: Ewc(-1), "Ewc's penalty must not be negative"),
        (lambda: Ewc(decay=2), "between 0 and 1"),
        (lambda: Ewc(examples=0), "examples must be positive"),
        (lambda: Lwf(temperature=0), "temperature > 0"),
        (lambda: Replay(0), "fraction must be"),
        (lambda: Replay(reservoir=0), "reservoir is a number"),
    ],
)
def test_bad_values(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("strategy", "mode", "gate"),
    [
        (OLora(), "sequential", False),
        (Drift(), "sequential", False),
        (Lwf(), "sequential", False),
        (L2(), "incremental", False),
        (Ewc(), "incremental", False),
        (Ewc(), "sequential", True),
        (Replay(), "joint", False),
    ],
)
def test_adapters_they_cannot_work_with(strategy, mode, gate):
    with pytest.raises(ValueError, match=r"[Uu]se "):
        strategy.check(mode, SimpleNamespace(gate=gate))


@pytest.mark.parametrize("method", ["olora", "nlora", "l2", "ewc", "lwf", "replay", "drift"])
def test_own_methods_are_allowed(method):
    row = get_method(method)
    for make in row.strategies:
        make().check(row.mode, SimpleNamespace(**row.adapter))

"""Strategies that change gradients or factors themselves: the hook, their formulas, what they promise, restarts."""

from dataclasses import dataclass, field

import pytest
import torch
import toy
from peft import get_peft_model

from hf_jumplora import ContinualRun, ContinualTrainer, JumpLoraConfig, finish_adapter
from hf_jumplora.strategies import Gorp, Migu, NullSpace, Slao, Strategy
from hf_jumplora.strategies.nullspace import output_directions
from hf_jumplora.tuner import named_layers


OPTIONS = {"r": 2, "target_modules": ["q_proj", "v_proj"], "gate": False}
IDS = torch.arange(3, 23).view(2, 10)


@dataclass
class Watch(Strategy):
    """Keeps what it sees of every task, and may wipe the gradients."""

    wipe: bool = False
    grads: list = field(default_factory=list, repr=False)
    starts: list = field(default_factory=list, repr=False)
    ends: list = field(default_factory=list, repr=False)
    optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)

    def on_optimizer(self, optimizer):
        self.optimizer = optimizer

    def on_task_start(self, model, adapter, examples):
        self.starts.append(factors(model, adapter))

    def on_gradients(self, model, adapter):
        both = [(layer.jumplora_A[adapter], layer.jumplora_B[adapter]) for _, layer in named_layers(model, adapter)]
        self.grads.append([(A.grad.clone(), B.grad.clone()) for A, B in both])
        if self.wipe:
            for A, B in both:
                A.grad.zero_()
                B.grad.zero_()

    def on_task_end(self, model, adapter, examples):
        self.ends.append(factors(model, adapter))
        self.moments = [
            tuple(self.optimizer.state[w[adapter]]["exp_avg"] for w in (layer.jumplora_A, layer.jumplora_B))
            for _, layer in named_layers(model, adapter)
            if "exp_avg" in self.optimizer.state.get(layer.jumplora_A[adapter], ())
        ]


def factors(model, adapter="default"):
    """(A, B) of every layer, in float64."""
    both = [(layer.jumplora_A[adapter], layer.jumplora_B[adapter]) for _, layer in named_layers(model, adapter)]
    return [(A.detach().double(), B.detach().double()) for A, B in both]


def run(base, folder, method, strategies=None, tasks=2, **options):
    made = toy.make_run(base, folder, method, stream=toy.tasks(tasks), **options)
    if strategies is not None:
        made.plan.strategies[:] = strategies
    return made


# ---- the hook -----------------------------------------------------------------------------------------------------


def test_gradients_are_whole(toy_base, tmp_path, relative_error):
    """Once an optimizer step, after the last micro-batch: the same as with one large batch."""
    seen = []
    for batch, accumulation in ((4, 1), (2, 2)):
        watch = Watch()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        run(toy_base, tmp_path / str(batch), "inclora", [watch], 1, lr_scheduler_type="constant", **sizes).train()
        assert len(watch.grads) == 8
        seen.append(watch.grads[0])
    for (_, one), (_, two) in zip(*seen, strict=True):  # A's are zero: B is
        assert relative_error(two, one) < 1e-5


def test_gradients_come_before_the_step(toy_base, tmp_path):
    """What the hook wipes is not learned; and it comes before clipping, whose factor would show in the gradient."""
    watch = Watch(wipe=True)
    run(toy_base, tmp_path / "a", "inclora", [watch], 1, max_grad_norm=1e-6).train()
    norm = torch.cat([g.flatten() for pair in watch.grads[0] for g in pair]).norm()
    assert norm > 1e-4
    for start, end in zip(watch.starts[0], watch.ends[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(start, end, strict=True))


def test_sharded_gradients_are_refused(toy_base, tmp_path):
    class Sharded(ContinualTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    model = get_peft_model(toy.load_base(toy_base), JumpLoraConfig(**OPTIONS))
    args = toy.arguments(tmp_path)
    Sharded(model=model, args=args, strategies=[Slao()])  # changes no gradient
    with pytest.raises(
        ValueError, match=r"Migu\(threshold=0.7\) changes gradients, which are not whole under DeepSpeed"
    ):
        Sharded(model=model, args=args, strategies=[Migu()])


# ---- formulas -----------------------------------------------------------------------------------------------------


def trained_model(base):
    """One task finished, another one about to be trained."""
    torch.manual_seed(0)
    model = get_peft_model(toy.load_base(base), JumpLoraConfig(**OPTIONS, init_weights=False))
    finish_adapter(model, "default", "task_000")
    model.add_adapter("default", JumpLoraConfig(**OPTIONS, init_weights=False, parent_adapters=["task_000"]))
    model.set_adapter("default")
    return model.train()


def test_migu_by_hand(toy_base, relative_error):
    """Row masks from mean |output| over the tokens of two micro-batches; no mask in the first task."""
    model, migu, inputs = trained_model(toy_base), Migu(0.6), {}
    for name, layer in named_layers(model):
        layer.register_forward_hook(
            lambda module, args, out, name=name: inputs.setdefault(name, []).append(
                (args[0].detach().double(), out.detach().double())
            )
        )
    migu.on_task_start(model, "default", None)
    migu.on_task_end(model, "default", None)
    assert not migu.handles
    migu.on_task_start(model, "default", None)
    model.eval()(input_ids=IDS + 20)  # an evaluation in between: no row of it counts
    assert not migu.magnitude
    inputs.clear()
    model.train()
    for ids in (IDS, IDS + 40):
        model(input_ids=ids, labels=ids).loss.backward()
    before = {
        name: [w["default"].grad.double() for w in (layer.jumplora_A, layer.jumplora_B)]
        for name, layer in named_layers(model)
    }
    migu.on_gradients(model, "default")
    for name, layer in named_layers(model):
        A, B = layer.jumplora_A["default"], layer.jumplora_B["default"]
        outputs = [[x @ A.detach().double().T for x, _ in inputs[name]], [y for _, y in inputs[name]]]
        for weight, grad, hidden in zip((A, B), before[name], outputs, strict=True):
            n = sum(h.abs().mean((0, 1)) for h in hidden)
            kept = (n / n.sum() > (n / n.sum()).quantile(0.6)).nonzero().flatten()
            expected = torch.zeros_like(grad)
            expected[kept] = grad[kept]
            assert 0 < len(kept) < len(n)
            assert relative_error(weight.grad, expected) < 1e-6
    assert not migu.magnitude  # the next step starts anew


def test_gorp_by_hand(toy_base, relative_error):
    """Against a float64 SVD: the fewest directions that hold the energy, then gradients off them, for two tasks."""
    model, gorp = trained_model(toy_base), Gorp(energy=0.6)
    torch.manual_seed(3)
    layers = [layer for _, layer in named_layers(model)]
    weights = [w["default"] for layer in layers for w in (layer.jumplora_A, layer.jumplora_B)]
    spaces = [None] * len(weights)
    for _ in range(2):
        optimizer = torch.optim.AdamW(weights, lr=1e-3)
        gorp.on_task_start(model, "default", None)
        gorp.on_optimizer(optimizer)
        for _ in range(3):
            grads = [torch.randn_like(w) for w in weights]
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad.clone()
            gorp.on_gradients(model, "default")
            for k, (weight, grad, S) in enumerate(zip(weights, grads, spaces, strict=True)):
                expected = grad.double().T if k % 2 == 0 else grad.double()
                if S is not None:
                    expected = expected - S @ S.T @ expected
                assert relative_error(weight.grad.T if k % 2 == 0 else weight.grad, expected) < 1e-5
            optimizer.step()
        for k, weight in enumerate(weights):
            M = optimizer.state[weight]["exp_avg"].double()
            U, sigma, _ = torch.linalg.svd(M.T if k % 2 == 0 else M, full_matrices=False)
            count = next(c for c in (1, 2) if sigma[:c].square().sum() >= 0.6 * M.square().sum())
            new = U[:, :count]
            spaces[k] = new if spaces[k] is None else torch.cat([spaces[k], new], 1)
        gorp.on_task_end(model, "default", None)
        for S, found in zip(spaces, gorp.spaces.values(), strict=True):
            assert relative_error(found.double() @ found.double().T, S @ S.T) < 1e-4
    assert len({S.shape[1] for S in spaces}) > 1  # sometimes one direction is enough


@pytest.mark.parametrize("shape", [(33, 47), (64, 20), (17, 90)])
def test_output_directions(shape, relative_error):
    """The span of the first left singular vectors of a dense float64 SVD; no more than the rank."""
    torch.manual_seed(0)
    update = torch.randn(shape[0], 12) @ torch.diag(0.5 ** torch.arange(12)) @ torch.randn(12, shape[1])
    U = torch.linalg.svd(update.double()).U
    for count, expected in ((3, 3), (12, 12), (40, 12)):
        V = output_directions(update, count)
        assert V.shape == (shape[0], expected)
        assert relative_error(V @ V.T, U[:, :expected] @ U[:, :expected].T) < 1e-3
        assert relative_error(V.T @ V, torch.eye(expected)) < 1e-5


def test_nullspace_by_hand(toy_base, relative_error):
    """Gradient and B lose their part along V, that of the earlier task's float64 SVD, and keep the rest."""
    model, strategy = trained_model(toy_base), NullSpace(2)
    strategy.on_task_start(model, "default", None)
    torch.manual_seed(0)
    for _, layer in named_layers(model):
        V = torch.linalg.svd(layer.update("task_000").double()).U[:, :2]
        B = layer.jumplora_B["default"]
        B.grad = torch.randn_like(B)
        grad, before = (t.detach().double() - V @ V.T @ t.detach().double() for t in (B.grad, B))
        strategy.on_gradients(model, "default")
        assert relative_error(B.grad, grad) < 1e-4
        strategy.on_step_end(model, "default")
        assert relative_error(B.detach(), before) < 1e-4


# ---- what they promise --------------------------------------------------------------------------------------------


def test_migu_leaves_rows_alone(toy_base, tmp_path):
    """One step of SGD from B = 0: the first task moves every row, the second one those above the quantile."""
    made = run(toy_base, tmp_path, "migu", max_steps=1, optim="sgd")
    made.train()
    for _, layer in named_layers(made.model):
        moved = [int((layer.jumplora_B[f"task_00{k}"] != 0).any(1).sum()) for k in range(2)]
        rows = layer.out_features
        assert moved[0] == rows
        assert moved[1] == rows - 1 - int(0.7 * (rows - 1))


def test_gorp_keeps_moments_apart(toy_base, tmp_path):
    """The second task's first moments have no part in the first one's space."""
    gorp, watch, first = Gorp(), Watch(), {}
    made = run(toy_base, tmp_path, "gorp", [watch, gorp])
    end = gorp.on_task_end

    def remember(model, adapter, examples):
        end(model, adapter, examples)
        first.update(first or gorp.spaces)

    gorp.on_task_end = remember
    made.train()
    for (A, B), S_in, S_out in zip(watch.moments, list(first.values())[::2], list(first.values())[1::2], strict=True):
        assert (A @ S_in).norm() < 1e-5 * A.norm()
        assert (B.T @ S_out).norm() < 1e-5 * B.norm()
        assert S_in.shape[1] > 0


def test_nullspace_writes_elsewhere(toy_base, tmp_path):
    """Outputs of each task's finished update are orthogonal to those of all tasks before it, for any input."""
    made = run(toy_base, tmp_path, "nullspace", tasks=3)
    made.train()
    for _, layer in named_layers(made.model):
        updates = [layer.update(f"task_00{k}").double() for k in range(3)]
        for k in (1, 2):
            past = sum(updates[:k])
            assert updates[k].norm() > 0
            assert (past.T @ updates[k]).norm() < 1e-4 * past.norm() * updates[k].norm()


def test_slao_by_hand(toy_base, tmp_path, relative_error):
    """Orthonormal start in the row space of the last A, B as last trained, B merged with 1 / sqrt(i), A replaced."""
    before, after = Watch(), Watch()
    made = run(toy_base, tmp_path, "slao", tasks=3)
    slao = made.plan.strategies[0]
    made.plan.strategies[:] = [_Order(before, slao, after)]
    made.train()
    trained, merged = before.ends, after.ends
    for k in range(len(trained[0])):
        B = trained[0][k][1]
        assert torch.equal(merged[0][k][1], B)
        for i in (1, 2):
            A_start, B_start = after.starts[i][k]
            A_last = trained[i - 1][k][0]
            assert relative_error(A_start @ A_start.T, torch.eye(2)) < 1e-5
            assert relative_error(A_last @ A_start.T @ A_start, A_last) < 1e-5
            assert (torch.diag(A_start @ A_last.T) > 0).all()
            assert torch.equal(B_start, trained[i - 1][k][1])
            B = B + (trained[i][k][1] - B) / (i + 1) ** 0.5
            assert relative_error(merged[i][k][1], B) < 1e-6
            assert torch.equal(merged[i][k][0], trained[i][k][0])
    for (_, B), (name, layer) in zip(merged[2], named_layers(made.model), strict=True):
        assert torch.equal(layer.jumplora_B["task_002"].double(), B), name


class _Order(Strategy):
    """Watches around another strategy."""

    def __init__(self, before, middle, after):
        self.all = [before, middle, after]

    def on_optimizer(self, optimizer):
        for part in self.all:
            part.on_optimizer(optimizer)

    def on_task_start(self, model, adapter, examples):
        for part in self.all:
            part.on_task_start(model, adapter, examples)

    def on_task_end(self, model, adapter, examples):
        for part in self.all:
            part.on_task_end(model, adapter, examples)


def test_hard_isolation_by_name(toy_base, tmp_path):
    """`jumplora-hard`: no entry is kept by two tasks, whatever the user's config says about isolation."""
    made = run(toy_base, tmp_path, "jumplora-hard")
    made.train()
    assert made.record.trained[1]["collision"] == [0.0]
    assert made.record.trained[1]["density"] > 0


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_options_that_cannot_be():
    for make in (lambda: Migu(1.0), lambda: Migu(-0.1), lambda: Gorp(0.0), lambda: Gorp(1.1), lambda: NullSpace(0)):
        with pytest.raises(ValueError, match=r"MIGU|GORP|null-space"):
            make()


def test_combinations_that_cannot_be(toy_base, tmp_path):
    for strategy, method, message in (
        (NullSpace(), "jumplora", "exact for dense updates on top"),
        (NullSpace(), "seqlora", "exact for dense updates on top"),
        (Slao(), "jumplora", "method='slao'"),
        (Slao(), "inclora", "method='slao'"),
    ):
        with pytest.raises(ValueError, match=message):
            ContinualRun(
                toy.load_base(toy_base), toy.tasks(2), method, toy.arguments(tmp_path), toy.tokenizer(),
                adapter_config=JumpLoraConfig(r=2, target_modules=["q_proj"]), strategies=[strategy],
            )  # fmt: skip
    with pytest.raises(ValueError, match="reads Adam's first moment, and this optimizer is SGD"):
        run(toy_base, tmp_path / "sgd", "gorp", optim="sgd").train()

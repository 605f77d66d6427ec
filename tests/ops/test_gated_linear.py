"""The gated linear layer: the specification against the published numbers, the blocked operator against both."""

import pytest
import torch
import torch.nn.functional as F

from hf_jumplora.ops import blocked, gated_linear
from hf_jumplora.ops.naive import effective_update
from hf_jumplora.ops.sparse import pack_bits


SHAPES = {"5x123x7": (5, 123, 7), "1x33x17": (1, 33, 17), "300x64x129": (300, 64, 129), "2x3x8x5": ((2, 3), 8, 5)}
BACKENDS = ("naive", "blocked")
NAMES = ("y", "x", "A", "B", "log_tau")


def shapes(*names):
    return pytest.mark.parametrize("shape", [SHAPES[n] for n in names or SHAPES], ids=names or list(SHAPES))


@pytest.fixture
def small_blocks(monkeypatch):
    """Row blocks of about 150 entries, so that every layer here has several, the last one shorter."""
    monkeypatch.setattr(blocked, "BLOCK_ENTRIES", 150)


def case(shape, rank=4, density=0.3, seed=0, dtype=torch.float32, with_bias=True, with_free=False, with_weight=True):
    """Random arguments of `gated_linear`; tau keeps about `density` of the entries. dict of tensors."""
    tokens, in_features, out_features = shape
    tokens = tokens if isinstance(tokens, tuple) else (tokens,)
    g = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.randn(*size, generator=g)

    A, B = rand(rank, in_features) * 0.3, rand(out_features, rank) * 0.3
    tau = (B @ A).abs().flatten().quantile(1 - density)
    c = {
        "x": rand(*tokens, in_features),
        "weight": rand(out_features, in_features) * 0.2 if with_weight else None,
        "bias": rand(out_features) if with_bias and with_weight else None,
        "A": A,
        "B": B,
        "log_tau": tau.log().reshape(1) + 1e-4,  # away from the entry that is the quantile
        "free": (torch.rand(out_features, in_features, generator=g) < 0.7) if with_free else None,
        "grad_y": rand(*tokens, out_features),
    }
    return {k: v if v is None or v.dtype == torch.bool else v.to(dtype) for k, v in c.items()}


def run(c, backend, dtype=None, autocast=False, **options):
    """{y, x, A, B, log_tau}: the output and the gradients. `autocast`: bf16, forward alone, as in training."""
    c = {k: v if v is None or v.dtype == torch.bool or dtype is None else v.to(dtype) for k, v in c.items()}
    leaves = {k: c[k].clone().requires_grad_() for k in NAMES[1:]}
    options = {"scaling": 4.0, "mix": 0.3, "bandwidth": 0.1, "free": c["free"], **options}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = gated_linear(
            leaves["x"], c["weight"], c["bias"], leaves["A"], leaves["B"], leaves["log_tau"], backend=backend, **options
        )
    y.backward(c["grad_y"].to(y.dtype))
    return {"y": y.detach(), **{k: v.grad for k, v in leaves.items()}}


# ---- against the published implementation -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "bound", "tau_bound"), [("naive", 1e-5, 1e-5), ("blocked", 1e-6, 1e-4)], ids=BACKENDS
)
@pytest.mark.parametrize("index", range(6))
def test_published_layer(golden, relative_error, small_blocks, index, backend, bound, tau_bound):
    layer = golden["layers"][index]
    t = golden["load"](layer["file"])
    c = {"x": t["x"], "weight": t["weight"], "bias": t.get("bias"), "free": None, "grad_y": t["grad_y"]}
    c |= {"A": t["lora_A"], "B": t["lora_B"], "log_tau": t["log_threshold"]}
    found = run(c, backend, scaling=layer["scaling"], mix=layer["mix"], bandwidth=layer["bandwidth"])
    expected = {"y": t["y"], "x": t["grad_x"], "A": t["grad_A"], "B": t["grad_B"], "log_tau": t["grad_log_threshold"]}
    for name in NAMES:
        assert relative_error(found[name], expected[name]) <= (tau_bound if name == "log_tau" else bound), name


# ---- blocked against the specification in float64 ----------------------------------------------------------------


def compare(relative_error, c, bounds=(1e-6, 1e-4), **options):
    found, expected = run(c, "blocked", **options), run(c, "naive", torch.float64, **options)
    for name in NAMES:
        bound = bounds[1] if name == "log_tau" else bounds[0]
        assert found[name].dtype == (c["x"].dtype if name in ("y", "x") else c["A"].dtype)
        assert relative_error(found[name], expected[name]) <= bound, name
    return expected


@shapes()
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("threshold_grad", ["mean", "sum"])
def test_blocked_is_naive(relative_error, small_blocks, shape, mix, threshold_grad):
    expected = compare(relative_error, case(shape), mix=mix, threshold_grad=threshold_grad)
    assert (expected["log_tau"] != 0) == (mix != 0)  # the band is not empty: the bound above means something


@shapes("5x123x7", "300x64x129")
@pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "update-only"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_free", [True, False], ids=["free", "all-free"])
def test_blocked_is_naive_optional_arguments(
    relative_error, small_blocks, shape, with_weight, with_bias, mix, with_free
):
    c = case(shape, with_weight=with_weight, with_bias=with_bias, with_free=with_free)
    compare(relative_error, c, mix=mix)


@pytest.mark.parametrize("rank", [1, 2, 7, 16])
def test_blocked_is_naive_ranks(relative_error, small_blocks, rank):
    compare(relative_error, case((20, 33, 47), rank=rank), mix=1.0)


def test_blocked_is_naive_one_block(relative_error):
    compare(relative_error, case((20, 33, 47)), mix=0.6)


@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_tau_below_half_the_bandwidth(relative_error, small_blocks, mix):
    c = case((11, 40, 23), density=0.9)
    tau = c["log_tau"].exp().item()
    D = (c["B"] @ c["A"]).abs()
    bandwidth = 4 * tau  # the rectangles around tau and -tau overlap, and cancel where they do
    assert (bandwidth / 2 - tau > D).any()
    assert ((bandwidth / 2 - tau < D) & (bandwidth / 2 + tau > D)).any()
    compare(relative_error, c, mix=mix, bandwidth=bandwidth)


def test_float64(relative_error, small_blocks):
    compare(relative_error, case((6, 41, 19), dtype=torch.float64), bounds=(1e-13, 1e-13), mix=0.375)


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_bf16_base_over_float32_factors(relative_error, small_blocks, mix):
    # Inputs are rounded before the comparison. What remains is the rounding of s E, of two products and of their sum to
    # 8 bits: 2^-9 each, about 4 of them. The threshold's gradient sums signed terms that were rounded so.
    c = case((64, 48, 40))
    for name in ("x", "weight", "bias", "grad_y"):
        c[name] = c[name].bfloat16()
    compare(relative_error, c, bounds=(8e-3, 3e-2), mix=mix)


def test_packed_and_dense_limits_are_the_same(small_blocks):
    c = case((5, 123, 7), with_free=True)
    for backend in BACKENDS:
        dense, packed = run(c, backend), run(c, backend, free=pack_bits(c["free"]))
        assert all(torch.equal(dense[name], packed[name]) for name in NAMES)


def test_closed_entries_get_no_update(small_blocks):
    c = case((5, 30, 20), with_weight=False, with_free=True)
    y = gated_linear(torch.eye(30), None, None, c["A"], c["B"], c["log_tau"], scaling=1.0, mix=0.5, free=c["free"])
    assert (y.T[~c["free"]] == 0).all()
    assert (y.T[c["free"]] != 0).any()


def test_weight_as_transposed_view(relative_error, small_blocks):
    c = case((9, 35, 26))
    c["weight"] = c["weight"].T.contiguous().T
    assert not c["weight"].is_contiguous()
    compare(relative_error, c)


def test_no_tokens():
    c = case((0, 12, 9))
    found = run(c, "blocked")
    assert found["y"].shape == (0, 9)
    assert (found["A"] == 0).all()
    assert (found["B"] == 0).all()


def test_input_without_gradient(relative_error, small_blocks):
    c = case((9, 35, 26))
    A = c["A"].requires_grad_()
    gated_linear(c["x"], c["weight"], None, A, c["B"], c["log_tau"], scaling=4.0, mix=0.3).backward(c["grad_y"])
    assert relative_error(A.grad, run({**c, "A": A.detach()}, "naive", bandwidth=1e-3)["A"]) <= 1e-6


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_gradient_of_base_weight_and_bias(relative_error, small_blocks, mix):
    c, grads = case((2, 35, 26)), {}
    for backend in BACKENDS:
        weight, bias = c["weight"].clone().requires_grad_(), c["bias"].clone().requires_grad_()
        y = gated_linear(c["x"], weight, bias, c["A"], c["B"], c["log_tau"], scaling=4.0, mix=mix, backend=backend)
        y.backward(c["grad_y"])
        grads[backend] = weight.grad, bias.grad
    for found, expected in zip(grads["blocked"], grads["naive"], strict=True):
        assert relative_error(found, expected) <= 1e-6


# ---- the support -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_entry_at_the_threshold_is_not_kept(backend):
    A, B = torch.ones(1, 4), torch.tensor([[1.0], [-1.0], [1.0 + 2**-20], [-1.0 - 2**-20], [0.0]])
    y = gated_linear(torch.eye(4), None, None, A, B, torch.zeros(1), scaling=1.0, mix=1.0, backend=backend)  # tau = 1
    assert torch.equal(y[0], torch.tensor([0.0, 0.0, 1.0 + 2**-20, -1.0 - 2**-20, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_support_is_the_base_layer(relative_error, backend):
    c = case((8, 21, 13))
    c["log_tau"] = torch.full((1,), 5.0)
    found = run(c, backend, mix=1.0)
    assert relative_error(found["y"], F.linear(c["x"], c["weight"], c["bias"])) <= 1e-6
    assert all((found[name] == 0).all() for name in ("A", "B", "log_tau"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_support_is_plain_lora(relative_error, backend):
    c = case((8, 21, 13))
    c["log_tau"] = torch.full((1,), -40.0)
    c["x"].requires_grad_()
    A, B = c["A"].clone().requires_grad_(), c["B"].clone().requires_grad_()
    y = F.linear(c["x"], c["weight"], c["bias"]) + 4.0 * F.linear(F.linear(c["x"], A), B)
    y.backward(c["grad_y"])
    found = run({**c, "x": c["x"].detach()}, backend, mix=1.0)
    for a, b in ((found["y"], y), (found["x"], c["x"].grad), (found["A"], A.grad), (found["B"], B.grad)):
        assert relative_error(a, b) <= 1e-6


def float32_support(c):
    return (c["B"] @ c["A"]).abs() > c["log_tau"].exp()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_support_is_that_of_float32(backend, how):
    c = case((1, 128, 96), rank=8, with_weight=False)
    expected = float32_support(c)
    rounded = (c["B"].bfloat16() @ c["A"].bfloat16()).abs() > c["log_tau"].exp()
    assert (expected != rounded).any()  # the case tells the two apart
    eye = torch.eye(128, dtype=torch.bfloat16 if how == "bf16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = gated_linear(eye, None, None, c["A"], c["B"], c["log_tau"], scaling=4.0, mix=1.0, backend=backend)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.T != 0, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_a_bf16_base(small_blocks, backend):
    c = case((16, 48, 40))
    found = run(c, backend, autocast=True)
    rounded = {k: c[k].bfloat16() if k in ("x", "weight", "bias", "grad_y") else c[k] for k in c}
    expected = run(rounded, backend)
    assert found["A"].dtype == found["log_tau"].dtype == found["x"].dtype == torch.float32
    for name in NAMES:
        assert torch.equal(found[name].to(expected[name].dtype), expected[name]), name


# ---- derivatives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mix", "with_free"), [(0.0, False), (0.4, True), (1.0, False)])
def test_finite_differences(small_blocks, backend, mix, with_free):
    c = case((3, 17, 14), rank=2, dtype=torch.float64, with_free=with_free)
    gap = ((c["B"] @ c["A"]).abs() - c["log_tau"].exp()).abs().min()
    assert gap > 1e-5  # no entry crosses the threshold within the step of 1e-6 below

    def f(x, A, B):
        return gated_linear(
            x, c["weight"], c["bias"], A, B, c["log_tau"], scaling=4.0, mix=mix, free=c["free"], backend=backend
        )

    assert torch.autograd.gradcheck(f, [c[k].requires_grad_() for k in ("x", "A", "B")], eps=1e-7, atol=1e-6)


def test_threshold_gradient_by_hand():
    # D = (0.3, -0.5, 0.9), tau = 0.5, band 0.4..0.6: only the second entry. dL/dE = s G.
    A, B = torch.tensor([[0.3, -0.5, 0.9]]), torch.ones(1, 1)
    log_tau = torch.tensor([0.5]).log()
    x, grad_y, s, f, bw = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[7.0]]), 4.0, 0.25, 0.2
    for mode, divisor in (("mean", 3), ("sum", 1)):
        for backend in BACKENDS:
            leaf = log_tau.clone().requires_grad_()
            options = {"scaling": s, "mix": f, "bandwidth": bw, "threshold_grad": mode, "backend": backend}
            gated_linear(x, None, None, A, B, leaf, **options).backward(grad_y)
            expected = 0.5 * -(0.5 / bw) * (s * f * (7.0 * 2.0) * -1) / divisor
            assert leaf.grad.item() == pytest.approx(expected, rel=1e-6)


def test_mix_may_change_between_forward_and_backward():
    c, mix = case((5, 30, 20)), torch.tensor([0.3])
    A = c["A"].clone().requires_grad_()
    y = gated_linear(c["x"], c["weight"], None, A, c["B"], c["log_tau"], scaling=4.0, mix=mix, bandwidth=0.1)
    mix.fill_(1.0)
    y.backward(c["grad_y"])
    assert torch.equal(A.grad, run({**c, "bias": None}, "blocked", mix=0.3)["A"])
    assert not torch.equal(A.grad, run({**c, "bias": None}, "blocked", mix=1.0)["A"])


# ---- memory and compilation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_nothing_of_the_weights_size_is_kept(mix):
    c = case((3, 50, 60), rank=2, with_free=True)
    leaves = [c[k].requires_grad_() for k in ("A", "B", "log_tau")]
    large = {}
    for backend in BACKENDS:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            gated_linear(c["x"], c["weight"], None, *leaves, scaling=4.0, mix=mix, free=c["free"], backend=backend)
        assert saved
        large[backend] = [t for t in saved if t.numel() >= 50 * 60 and t.data_ptr() != c["weight"].data_ptr()]
    assert large["naive"]
    assert not large["blocked"]


def test_compiles_to_one_graph_whatever_the_mix(relative_error):
    from torch._dynamo.testing import CompileCounterWithBackend

    c, counter = case((5, 30, 20), with_free=True), CompileCounterWithBackend("aot_eager")
    free = pack_bits(c["free"])

    def f(x, A, B, log_tau, mix):
        return gated_linear(x, c["weight"], c["bias"], A, B, log_tau, scaling=4.0, mix=mix, bandwidth=0.1, free=free)

    compiled, mix = torch.compile(f, backend=counter, fullgraph=True), torch.zeros(1)
    for value in (0.0, 0.2, 0.7, 1.0):
        mix.fill_(value)
        leaves = [c[k].clone().requires_grad_() for k in NAMES[1:]]
        y = compiled(*leaves, mix)
        y.backward(c["grad_y"])
        expected = run(c, "naive", mix=value)
        for found, name in zip((y, *(leaf.grad for leaf in leaves)), NAMES, strict=True):
            assert relative_error(found, expected[name]) <= 1e-6 or (value == 0 and name == "log_tau")
    assert counter.frame_count == 1


# ---- bad arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backend": "cuda"}, "'cuda'"),
        ({"threshold_grad": "median"}, "'median'"),
        ({"x": torch.zeros(5, 9)}, r"x \(5, 9\)"),
        ({"A": torch.zeros(3, 8)}, r"A \(3, 8\)"),
        ({"weight": torch.zeros(8, 6)}, r"weight \(8, 6\)"),
        ({"weight": None}, "bias needs a weight"),
        ({"bias": torch.zeros(8)}, r"bias \(8,\)"),
        ({"free": torch.ones(8, 6, dtype=torch.bool)}, r"free \(8, 6\)"),
        ({"free": torch.ones(5, dtype=torch.uint8)}, r"free \(5,\)"),
        ({"log_tau": torch.zeros(6)}, r"log_tau \(6,\)"),
        ({"mix": 1.5}, "mix"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend, change, named):
    arguments = {"x": torch.zeros(5, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6), "A": torch.zeros(2, 8)}
    arguments |= {"B": torch.zeros(6, 2), "log_tau": torch.zeros(1), "scaling": 1.0, "mix": 0.5, "backend": backend}
    with pytest.raises(ValueError, match=named):
        gated_linear(**{**arguments, **change})


def test_effective_update_is_the_function_behind_the_layer():
    c = case((4, 16, 12), with_weight=False, with_free=True)
    E = effective_update(c["A"], c["B"], c["log_tau"], mix=0.3, free=c["free"])
    y = gated_linear(torch.eye(16), None, None, c["A"], c["B"], c["log_tau"], scaling=1.0, mix=0.3, free=c["free"])
    assert torch.allclose(y.T, E, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_autocast_keeps_no_copy_of_the_weight(mix):
    weight, kept = torch.randn(64, 48), []
    A, B, log_tau = torch.randn(4, 48, requires_grad=True), torch.randn(64, 4), torch.zeros(1)

    def pack(tensor):
        if tensor.numel() == weight.numel():
            kept.append(tensor.data_ptr() == weight.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = gated_linear(torch.randn(3, 48), weight, None, A, B, log_tau, scaling=1.0, mix=mix)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert kept == [True]
    assert A.grad.isfinite().all()


# ---- which way the products go -----------------------------------------------------------------------------------


@pytest.fixture(params=[0.0, 1.0], ids=["whole-gradient", "sampled-gradient"])
def share(request, monkeypatch):
    """SPARSE_SHARE at both ends: the gradient by whole products alone, and by single entries alone."""
    monkeypatch.setattr(blocked, "SPARSE_SHARE", request.param)
    return request.param


@shapes("5x123x7", "1x33x17", "300x64x129")
@pytest.mark.parametrize("mix", [0.3, 1.0])
@pytest.mark.parametrize("with_free", [True, False], ids=["free", "all-free"])
def test_both_gradients_are_naive(relative_error, small_blocks, share, shape, mix, with_free):
    compare(relative_error, case(shape, with_free=with_free), mix=mix)


@pytest.mark.parametrize("factor", [0.5, 1.5, 4.0])
def test_both_gradients_whatever_the_bandwidth(relative_error, small_blocks, share, factor):
    c = case((11, 40, 23), density=0.5)
    expected = compare(relative_error, c, mix=1.0, bandwidth=factor * c["log_tau"].exp().item())
    assert expected["log_tau"] != 0


def test_few_entries_are_sampled(monkeypatch, relative_error):
    products, sampled_product = [], blocked.sampled_product
    monkeypatch.setattr(blocked, "sampled_product", lambda *a: products.append(len(a[2])) or sampled_product(*a))
    compare(relative_error, case((40, 64, 50), density=0.02), mix=0.5, bandwidth=1e-3)
    assert 0 < sum(products) < 0.1 * 64 * 50
    products.clear()
    compare(relative_error, case((40, 64, 50), density=0.5), mix=0.5, bandwidth=1e-3)
    assert not products


def test_a_threshold_that_is_not_learned_gets_no_gradient(relative_error, small_blocks, share):
    c = case((9, 35, 26))
    expected = run(c, "naive", torch.float64)
    leaves = {k: c[k].clone().requires_grad_() for k in ("x", "A", "B")}
    y = gated_linear(
        leaves["x"], c["weight"], c["bias"], leaves["A"], leaves["B"], c["log_tau"],
        scaling=4.0, mix=0.3, bandwidth=0.1,
    )  # fmt: skip
    y.backward(c["grad_y"])
    assert all(relative_error(leaf.grad, expected[name]) <= 1e-6 for name, leaf in leaves.items())


@pytest.mark.parametrize("native", [True, False], ids=["bf16-products", "float32-products"])
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("with_free", [True, False], ids=["free", "all-free"])
def test_bf16_base_on_either_cpu(monkeypatch, relative_error, small_blocks, share, native, mix, with_free):
    monkeypatch.setattr(blocked, "_multiplies", lambda dtype: native)
    c = case((64, 48, 40), with_free=with_free)
    for name in ("x", "weight", "bias", "grad_y"):
        c[name] = c[name].bfloat16()
    compare(relative_error, c, bounds=(8e-3, 3e-2), mix=mix)
    if not native and mix:  # only the results are rounded
        found, expected = run(c, "blocked", mix=mix), run(c, "naive", torch.float64, mix=mix)
        assert all(relative_error(found[name], expected[name]) <= 3e-3 for name in ("y", "x"))
        assert all(relative_error(found[name], expected[name]) <= 1e-5 for name in ("A", "B", "log_tau"))


@pytest.mark.parametrize("native", [True, False], ids=["bf16-products", "float32-products"])
def test_updates_below_the_rounding_of_a_bf16_weight_survive(monkeypatch, relative_error, native):
    monkeypatch.setattr(blocked, "_multiplies", lambda dtype: native)
    c = case((32, 48, 40), with_bias=False)
    half = c["x"][:, :24].bfloat16()
    c["x"] = torch.cat([half, -half], 1)  # the base's product is exactly zero, what is left is the update's
    weight = torch.ones(40, 24).uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    c["weight"], c["grad_y"] = torch.cat([weight, weight], 1).bfloat16(), c["grad_y"].bfloat16()
    E = effective_update(c["A"], c["B"], c["log_tau"], mix=1.0)
    scaling = 2**-12 / E.abs().max().item()  # W + s E, rounded to bf16, is W
    assert torch.equal((c["weight"].float() + scaling * E).bfloat16(), c["weight"])
    found = run(c, "blocked", mix=1.0, scaling=scaling)
    assert relative_error(found["y"], scaling * c["x"].double() @ E.double().T) <= 1e-2

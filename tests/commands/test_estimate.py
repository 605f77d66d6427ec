"""`hf-jumplora estimate`: what it counts is what models, runs and processes really hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, LlamaConfig, T5Config

from hf_jumplora import JumpLoraConfig
from hf_jumplora.cli import main
from hf_jumplora.memory import (
    UNDER,
    ZERO_BUCKET,
    Plan,
    activations,
    estimate,
    live_sum,
    model_config,
    share_after,
    skeleton,
)
from hf_jumplora.memory import sizes as sizes_of
from hf_jumplora.methods import get_method
from hf_jumplora.strategies import Ella, LayerSize
from hf_jumplora.tuner import named_layers


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LLAMA = LlamaConfig(
    vocab_size=200, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2,
)  # fmt: skip
GPT2 = GPT2Config(
    n_embd=96, n_layer=2, n_head=4, vocab_size=200, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0,
    eos_token_id=1,
)  # fmt: skip
T5 = T5Config(
    d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, vocab_size=200, dropout_rate=0, decoder_start_token_id=0
)


@pytest.mark.parametrize(
    ("name", "parameters", "entries"),
    [
        ("llama-2-7b", 6_738_415_616, 32 * 2 * 4096**2),
        ("Llama-2-13b", 13_015_864_320, 40 * 2 * 5120**2),
        ("llama-2-70b", 68_976_648_192, 80 * (8192**2 + 1024 * 8192)),
    ],
)
def test_published_sizes(name, parameters, entries):
    """Without any weights: the numbers of parameters that are published, q and v adapted."""
    size = sizes_of(skeleton(model_config(name), JumpLoraConfig(), torch.bfloat16))
    assert (size.parameters, size.weights, size.entries) == (parameters, 2 * parameters, entries)


def kept_by_autograd(model, batch, length):
    """Bytes of all tensors that a real forward pass keeps for the backward pass, weights and buffers apart."""
    here = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in here:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    ids = torch.randint(0, 100, (batch, length))
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(input_ids=ids, use_cache=False, **extra)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["query-value", "all-linear"])
@pytest.mark.parametrize("config", [LLAMA, GPT2, T5], ids=["llama-gqa", "gpt2", "t5"])
def test_activations(config, targets, dtype):
    """As many bytes as a real forward pass keeps for the backward pass."""
    adapter = {"r": 2, "target_modules": targets}
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    real = kept_by_autograd(get_peft_model(auto.from_config(config, dtype=dtype), JumpLoraConfig(**adapter)), 3, 40)
    counted, _ = activations(skeleton(config, JumpLoraConfig(**adapter), dtype), 3, 40, False)
    assert counted == pytest.approx(real, rel=0.01)


def test_activations_under_zero3(monkeypatch):
    """With DeepSpeed's linear function, which keeps the input of frozen layers too."""
    linear = pytest.importorskip("deepspeed.runtime.zero.linear").zero3_linear_wrap
    plain, _ = activations(skeleton(LLAMA, JumpLoraConfig(), torch.float32), 3, 40, False)
    counted, _ = activations(skeleton(LLAMA, JumpLoraConfig(), torch.float32), 3, 40, False, zero3=True)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    model = get_peft_model(AutoModelForCausalLM.from_config(LLAMA), JumpLoraConfig())
    assert counted == pytest.approx(kept_by_autograd(model, 3, 40), rel=0.01)
    assert counted > 1.05 * plain


def test_buckets_of_the_recipes():
    """The planner counts the buckets that the shipped DeepSpeed configs ask for."""
    configs = sorted((BENCHMARKS.parent / "recipes" / "deepspeed").glob("*.json"))
    assert [json.loads(c.read_text())["zero_optimization"]["reduce_bucket_size"] for c in configs] == 4 * [ZERO_BUCKET]


def test_activations_with_gradient_checkpointing():
    """Every block keeps its input; what one block keeps is there once, in its backward pass."""
    model = skeleton(LLAMA, JumpLoraConfig(), torch.float32)
    everything, widest = activations(model, 3, 40, False)
    kept, block = activations(model, 3, 40, True)
    hidden = 3 * 40 * 128 * 4
    assert 3 * hidden <= kept < 3 * hidden + 4 * hidden  # and the last norm's
    assert kept + 3 * (block - widest) == pytest.approx(everything, rel=0.15)


def held(run, adapter):
    """What the layers hold on top of their weights while the last task is trained: bytes by kind."""
    layers = [layer for _, layer in named_layers(run.model)]
    return {
        "factors": sum(layer.jumplora_A[adapter].nbytes + layer.jumplora_B[adapter].nbytes for layer in layers),
        "originals": sum(layer.finished.original.nbytes for layer in layers if layer.finished.original is not None),
        "summed": sum(layer.finished.sum.nbytes + layer.finished.bits.nbytes for layer in layers),
        "masks": sum(layer.jumplora_free[adapter].nbytes for layer in layers if adapter in layer.jumplora_free),
        "live": sum(t.nbytes for layer in layers for past in layer.finished.past.values() for t in past),
    }  # fmt: skip


@pytest.mark.parametrize("four_bit", [False, True], ids=["float", "4-bit"])
def test_what_a_run_remembers(four_bit, toy_base, tmp_path):
    """In the third task, under hard isolation and ELLA: masks, sums, copies and the optimizer's state. Byte by byte
    where the planner can know them, and from the measured density where it can't."""
    options = {}
    if four_bit:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    seen = {}

    class Look(toy.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            if len(run.record.trained) == 2 and state.global_step == 8:
                state = [t for values in optimizer.state.values() for t in values.values() if t.numel() > 1]
                seen.update(held(run, "default"), optimizer=sum(t.nbytes for t in state))
                (ella,) = [s for s in run.plan.strategies if isinstance(s, Ella)]
                seen["ella"] = sum(t.nbytes for past in ella.past.values() for t in past)
                sums = [layer.total_update(["task_000", "task_001"]) for _, layer in named_layers(run.model)]
                seen["share"] = sum(int(s.count_nonzero()) for s in sums) / sum(s.numel() for s in sums)

    adapter = {"isolation": "hard", "threshold_update": "density", "target_density": 0.01, "threshold_scope": "layer"}
    base = toy.load_base(toy_base, **options)
    weights = sum(p.nbytes for p in base.parameters())
    if four_bit:
        weights += sum(p.quant_state.absmax.nbytes for p in base.parameters() if hasattr(p, "quant_state"))
    run = toy.make_run(base, tmp_path, "jumplora-ella", adapter=adapter, callbacks=[Look()])
    run.train()

    plan = Plan(1, 4, 16, torch.float32, False, 2, 0.01, "jumplora-ella")
    planned = estimate(toy.config(), JumpLoraConfig(r=2, target_modules=["q_proj", "v_proj"], **adapter), plan)
    row = planned["ddp_4bit" if four_bit else "ddp"]
    entries, factors = 4 * 32 * 32 - 2 * 16 * 32, seen["factors"] // 4
    assert row["weights"] == weights
    assert seen["masks"] == entries // 8
    assert row["host"] == seen["originals"] + seen["summed"]
    assert row["optimizer"] == pytest.approx(seen["optimizer"], abs=40)
    assert row["factors"] == pytest.approx(2 * seen["factors"], abs=40)  # the newest finished task is there too
    assert seen["share"] == pytest.approx(share_after(2, 0.01, True), rel=0.05)
    rows = 4 * 4 * 33  # row pointers, which do not count in layers that are not this small
    shapes = [(32, 32), (16, 32), (32, 32), (16, 32)]  # of q_proj and v_proj in both blocks
    layers = [LayerSize(*shape, 2, changed=seen["share"]) for shape in shapes]
    assert seen["ella"] == pytest.approx(Ella().memory_bytes(layers, 2) - 4 * factors, abs=4 * rows)
    assert seen["live"] == pytest.approx(live_sum(entries, seen["share"]) if four_bit else 0, abs=2 * rows)
    assert bool(seen["live"]) is four_bit


@pytest.mark.parametrize("method", ["jumplora-best", "jumplora-kfac"])
def test_what_kfac_remembers(method, toy_base, tmp_path):
    """Roots of fixed size, or whole factors of every task: the bytes of the strategy's state after two tasks."""
    run = toy.make_run(toy_base, tmp_path, method, stream=toy.tasks(2))
    run.train()
    (kfac,) = run.plan.strategies
    kept = sum(t.nbytes for part in (kfac.G, kfac.C) for t in part.values())
    kept += sum(group.G.nbytes + group.C.nbytes for group in kfac.groups)
    layers = [layer for _, layer in named_layers(run.model)]
    assert kfac.memory_bytes(layers, 2) == kept
    pasts = []
    for name in (method, "jumplora"):
        config = get_method(name).adapter_config(JumpLoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        pasts.append(estimate(toy.config(), config, Plan(tasks=2, method=name))["ddp"]["past"])
    assert pasts[0] - pasts[1] == kept


def test_ways_to_train():
    """What each cuts, what each adds; the parts add up."""
    plan = Plan(processes=4, tasks=3)
    rows = estimate(LLAMA, JumpLoraConfig(), plan)
    assert list(rows) == list(UNDER)
    for row in rows.values():
        assert row["total"] == sum(size for part, size in row.items() if part not in ("total", "host"))
    ddp, zero3, fsdp2 = rows["ddp"], rows["zero3"], rows["fsdp2"]
    assert zero3["weights"] == fsdp2["weights"] == ddp["weights"] // 4
    assert rows["zero1"]["optimizer"] == rows["zero3"]["optimizer"]
    assert rows["zero1"]["gradients"] == 4 * rows["zero2"]["gradients"]
    assert rows["zero3_offload"]["weights"] == rows["zero3_offload"]["optimizer"] == 0
    assert rows["zero3_offload"]["host"] == zero3["host"] + zero3["weights"] + zero3["optimizer"]
    # DeepSpeed keeps up to 1e9 parameters, and fetches up to 5e7 ahead.
    assert 0 < fsdp2["gathered"] <= zero3["gathered"] == 2 * ddp["weights"]
    assert rows["ddp_4bit"]["weights"] < ddp["weights"] / 2
    alone = estimate(LLAMA, JumpLoraConfig(), Plan(tasks=3))
    assert alone["zero3"]["gathered"] == alone["fsdp2"]["gathered"] == 0
    assert (alone["ddp"]["buckets"], ddp["buckets"]) == (0, ddp["gradients"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("case", ["ella-hard", "zero3"])
def test_peak_of_a_run(case):
    """The peak of a process in a run of some tasks; benchmarks/estimate.py has more of these."""
    code = f"import json, estimate; print(json.dumps(estimate.case({case!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS.parent), *sys.path])},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["measured_mib"] > 200
    assert 0.85 < found["ratio"] < 1.15


def test_command(tmp_path, capsys):
    """A folder with a config and no weights is enough."""
    LLAMA.save_pretrained(tmp_path)
    assert main(["estimate", str(tmp_path), "--processes", "2", "--tasks", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == estimate(LLAMA, JumpLoraConfig(), Plan(processes=2, tasks=4))
    line = ["--under", "zero3", "ddp_4bit", "--target_modules", "all-linear", "--gradient_checkpointing"]
    assert main(["estimate", str(tmp_path), *line]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in lines[-2:]] == ["zero3", "ddp_4bit"]
    assert len({len(row) for row in lines[-3:]}) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["nowhere/"], "is none of llama-2-7b, llama-2-13b, llama-2-70b, and cannot be read"),
        (["llama-2-7b", "--processes", "0"], "--processes is at least 1, got 0"),
        (["llama-2-7b", "--density", "3"], "--density is a fraction"),
        (["llama-2-7b", "--method", "ewc"], "the memory of method 'ewc' is not known"),
        (["llama-2-7b", "--method", "nonsense"], "unknown method 'nonsense'"),
        (["llama-2-7b", "--target_modules", "q_pro"], "Near names: o_proj, q_proj"),
        (["llama-2-7b", "--method", "inclora", "--isolation", "hard"], "has no gate, and isolation"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", *line]) == 2
    assert message in capsys.readouterr().err

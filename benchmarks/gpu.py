"""`make test-gpu`, after the tests: what a GPU is asked for, on a GPU. About six minutes; a short table comes last.

    python benchmarks/gpu.py [layer] [model] [curvature] [small] [--rounds 7] [--base FOLDER]

layer: one gated layer against a frozen one and PEFT's LoRA. model: a step of Llama-2-7B's shapes (random weights, bf16,
adapters of rank 8 on q and v, 8 x 512 tokens), alone and with all that `jumplora-best` adds, and its waits by torch's
own check. curvature: what follows a task, on a causal model in a folder (else on random weights of SmolLM2's shapes).
small: steps of the trainer and compiled steps on SmolLM2's shapes, where the host's time decides.
"""

import argparse
import time
import warnings
from functools import partial

import torch
from common import DEVICE, append, interleave, machine, report

from hf_jumplora.tuner import density, set_mix, set_threshold


SUMMARY: list[str] = []


def note(text: str) -> None:
    """Keep a line for the table at the end."""
    print(text, flush=True)
    SUMMARY.append(text)


def ratios(benchmark: str, setting: dict, seconds: dict[str, list[float]], baseline: str) -> None:
    """Report a benchmark and keep its medians for the table."""
    report(benchmark, setting, seconds, baseline)
    medians = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    cells = (f"{name} {1e3 * t:.2f} ms ({t / medians[baseline]:.2f})" for name, t in medians.items())
    SUMMARY.append(f"{benchmark} {' '.join(str(value) for value in setting.values())}: " + ", ".join(cells))


def seconds(step) -> float:
    """Of one call, the device's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def captured(step):
    """The same work replayed as a CUDA graph: the device's time, without the host's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def layers(rounds: int) -> None:
    """One layer, W [4096, 4096], forward and backward; as it is called, and as a graph."""
    import layer

    settings = [(8, 4096, 0.7, "bfloat16"), (8, 4096, 0.0, "bfloat16"), (8, 4096, 1.0, "bfloat16")]
    settings += [(8, 512, 0.7, "bfloat16"), (8, 512, 0.0, "bfloat16"), (64, 4096, 0.7, "bfloat16")]
    settings += [(8, 16384, 0.7, "bfloat16"), (8, 4096, 0.7, "float32")]
    for rank, tokens, mix, dtype in settings:
        providers, _ = layer.setup(4096, rank, tokens, mix, 0.3, getattr(torch, dtype))
        wanted = {name: providers[name] for name in ("frozen", "lora", "triton", "triton-fold")}
        for step in wanted.values():
            step()  # kernels are compiled
        setting = {"size": 4096, "r": rank, "tokens": tokens, "mix": mix, "dtype": dtype}
        ratios("layer", setting, interleave(wanted, 2 * rounds + 1), "frozen")
        graphs = {name: captured(step) for name, step in wanted.items()}
        ratios("layer, graph", setting, interleave(graphs, 2 * rounds + 1), "frozen")
        del providers, wanted, graphs


def llama(config):
    """Random weights, made on the GPU."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def models(rounds: int, num_layers: int) -> None:
    """A step of 7B shapes."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig

    from hf_jumplora import JumpLoraConfig
    from hf_jumplora.strategies import KFac
    from hf_jumplora.tuner import named_layers
    from hf_jumplora.tuner.density_sample import DensitySample
    from hf_jumplora.tuner.lookup import adapter_config

    shapes = LlamaConfig(num_hidden_layers=num_layers, vocab_size=32000)
    tokens, targets = torch.randint(0, 32000, (8, 512), device=DEVICE), ["q_proj", "v_proj"]
    setting = {"hidden": 4096, "layers": num_layers, "tokens": 4096, "r": 8}

    def trained(model, penalty=None, after=None):
        model.train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-8)

        def step():
            output = model(input_ids=tokens, labels=tokens)
            loss = output.loss if penalty is None else output.loss + penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if after is not None:
                after()

        return step

    def peak(step) -> float:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**30

    lora = get_peft_model(llama(shapes), LoraConfig(r=8, lora_alpha=32, target_modules=targets))
    base = trained(lora)
    base()
    peaks = {"lora": peak(base)}
    config = JumpLoraConfig(r=8, target_modules=targets, init_weights=False, threshold_update="density",
                            target_density=0.3)  # fmt: skip
    jump = get_peft_model(llama(shapes), config)
    before = torch.cuda.memory_allocated() / 2**30
    set_threshold(jump, "default", 0.3)
    kfac, width = KFac(weight=1.0, memory=64), 4096
    for name, _ in named_layers(jump):
        kfac.G[name], kfac.C[name] = (torch.randn(1, width, 64, device=DEVICE) * 1e-3 for _ in range(2))
    kfac.tasks = 1
    kfac.on_task_start(jump, "default", None)
    sample, own = DensitySample(jump, "default"), adapter_config(jump, "default")
    steps = {
        "gate": trained(jump),
        "gate + kfac": trained(jump, lambda: kfac.penalty(jump, {}, "default", {})),
        "gate + held": trained(jump, after=lambda: sample.hold(own, 0.3)),
        "all": trained(jump, lambda: kfac.penalty(jump, {}, "default", {}), lambda: sample.hold(own, 0.3)),
    }
    for mix in (0.7, 0.0, 1.0):
        set_mix(jump, "default", mix)
        chosen = steps if mix == 0.7 else {"all": steps["all"]}
        for step in chosen.values():
            step()
        ratios("7B step", {**setting, "mix": mix}, interleave({"lora": base, **chosen}, rounds), "lora")
    peaks["jumplora-best"] = peak(steps["all"])
    # Both models are there: what the other one holds is taken off.
    note(f"peak memory, GiB, both models resident for the second (before it {before:.1f}): {peaks}")
    append("7B peak", setting, **{name: round(value, 2) for name, value in peaks.items()})
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps["all"]()
    torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    note(f"waits of a step with penalty and held density, by torch's own check: {len(waits)}")
    for wait in waits[:5]:
        print("  ", wait.filename, wait.lineno, str(wait.message)[:100])
    exact = partial(set_threshold, jump, "default", 0.3)
    once = {"set_threshold": seconds(exact), "density": seconds(lambda: density(jump, "default"))}
    once["hold"] = seconds(lambda: sample.hold(own, 0.3))
    sample.hold(own, 0.3)
    once["held density, exact"] = density(jump, "default")
    note(f"once a task, s: { ({name: round(value, 4) for name, value in once.items()}) }")
    append("7B once", setting, **{name: round(value, 5) for name, value in once.items()})
    from hf_jumplora.stack.load import merge_finished
    from hf_jumplora.tuner import finish_adapter

    set_mix(jump, "default", 1.0)
    ends = {"finish": seconds(lambda: finish_adapter(jump, "default", "task_000"))}
    ends["density"] = seconds(lambda: density(jump, "task_000"))
    ends["merge"] = seconds(lambda: merge_finished(jump, ["task_000"]))
    ends["unmerge"] = seconds(jump.unmerge_adapter)
    note(f"end of a task, s: { ({name: round(value, 3) for name, value in ends.items()}) }")
    append("7B task end", setting, **{name: round(value, 3) for name, value in ends.items()})


def curvature(folder: str | None) -> None:
    """512 examples of 20 to 150 tokens after a task of rank-64 curvature, q and v."""
    from peft import get_peft_model
    from small_model import smollm2_shape
    from transformers import AutoModelForCausalLM

    from hf_jumplora import JumpLoraConfig
    from hf_jumplora.strategies import KFac

    if folder:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
    else:
        model = smollm2_shape().eval()
    config = JumpLoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_weights=False, initial_density=0.3)
    peft = get_peft_model(model, config)
    set_threshold(peft, "default", 0.3)
    set_mix(peft, "default", 1.0)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(512):
        length = int(torch.randint(20, 150, (), generator=generator))
        ids = torch.randint(0, 40000, (1, length), generator=generator)
        labels = ids.clone()
        labels[:, :-3] = -100
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        rows.append({key: value.to(DEVICE) for key, value in row.items()})
    kfac = KFac(memory=64)

    def examples(count, rows_=None, batch=1, **options):
        return iter(rows[:count])

    for task in range(2):
        took = seconds(lambda: kfac.on_task_end(peft, "default", examples))
        note(f"curvature after task {task}, 512 examples: {took:.2f} s")
        append("curvature", {"examples": 512, "rank": 64, "task": task}, seconds=round(took, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["layer", "model", "curvature", "small"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=32, help="of the 7B-shaped model")
    parser.add_argument("--base", help="folder of a causal language model, for the curvature")
    args = parser.parse_args()
    assert DEVICE == "cuda", "no GPU, or a torch without CUDA or ROCm"
    with torch.autograd.set_multithreading_enabled(False):  # as in a step of the trainer
        if "layer" in args.what:
            layers(args.rounds)
        if "model" in args.what:
            models(args.rounds, args.layers)
        if "curvature" in args.what:
            curvature(args.base)
    if "small" in args.what:
        from small_model import small

        note(small(args.rounds))
    print(f"\n{machine()}, torch {torch.__version__}")
    print("\n".join(SUMMARY))


if __name__ == "__main__":
    main()

"""The quantile over 1e8 entries, ELLA's penalty on one layer, and the step of a whole model.

python benchmarks/pieces.py {quantile,penalty,model} [--rounds 7]
"""

import argparse
import functools
import subprocess
import sys

import torch
from common import DEVICE, append, interleave, peak_growth, report

from hf_jumplora.ops.penalty import overlap_penalty, sparse_past
from hf_jumplora.ops.quantile import kth_magnitude, update_blocks


def finders():
    """(the same k-th magnitude by each provider, what they found), over six layers of 4096 x 4096, 2 % kept."""
    torch.manual_seed(0)
    factors = [
        (torch.randn(8, 4096, device=DEVICE) * 0.02, torch.randn(4096, 8, device=DEVICE) * 0.02, None) for _ in range(6)
    ]
    k = round(6 * 4096**2 * 0.98)
    found: dict[str, float] = {}

    def dense():
        found["dense"] = torch.cat([(B @ A).flatten() for A, B, _ in factors]).abs().kthvalue(k).values.item()

    def streamed(name, **options):
        found[name] = kth_magnitude(functools.partial(update_blocks, factors), k, **options)

    return {
        "dense": dense,
        "streamed": lambda: streamed("streamed"),
        "near": lambda: streamed("near", near=found["dense"] * 1.003),
        "by bits": lambda: streamed("by bits", reduce=lambda counts: None),
    }, found


def quantile(rounds: int = 7) -> None:
    """1e8 entries, exact, against torch.cat and kthvalue: time, and memory of each in a fresh process."""
    providers, found = finders()
    setting = {"entries": 6 * 4096**2, "kept": 0.02}
    seconds = interleave(providers, rounds)
    assert len(set(found.values())) == 1, found
    report("quantile", setting, seconds, "dense")
    if sys.platform == "linux":
        for name in ("dense", "streamed", "by bits"):
            command = [sys.executable, __file__, "quantile", "--memory", name]
            peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
            append("memory", {**setting, "provider": name}, peak_mib=int(peak), saved_mib=0)


def penalty(density: float, rounds: int = 7) -> None:
    """ELLA's penalty on one layer of 4096 x 4096, forward and backward; `density` of W_past is not zero."""
    torch.manual_seed(0)
    A = (torch.randn(8, 4096, device=DEVICE) * 0.02).requires_grad_()
    B = (torch.randn(4096, 8, device=DEVICE) * 0.02).requires_grad_()
    past = torch.randn(4096, 4096, device=DEVICE) * (torch.rand(4096, 4096, device=DEVICE) < density)
    few = sparse_past(past)
    seconds = interleave(
        {
            "eager": lambda: (4.0 * (B @ A) * past).square().sum().backward(),
            "blocked": lambda: overlap_penalty(A, B, None, past, scaling=4.0).backward(),
            "non-zeros": lambda: overlap_penalty(A, B, None, few, scaling=4.0).backward(),
        },
        rounds,
    )
    report("penalty", {"size": 4096, "r": 8, "density": density}, seconds, "eager")


def model(rounds: int = 7) -> None:
    """A training step (forward, backward, AdamW) of Llama shapes, 512 tokens, adapters of rank 8 on q and v."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_jumplora import JumpLoraConfig
    from hf_jumplora.tuner import set_mix, set_threshold

    shapes = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, vocab_size=4096
    )
    tokens = torch.randint(0, 4096, (1, 512), device=DEVICE)
    targets = ["q_proj", "v_proj"]

    def build(config, mix=None):
        torch.manual_seed(0)
        wrapped = get_peft_model(LlamaForCausalLM(shapes).to(DEVICE), config)
        if mix is not None:
            set_threshold(wrapped, "default", 0.02)
            set_mix(wrapped, "default", mix)
        # A learning rate that leaves the density as it is.
        optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=1e-8)

        def step():
            wrapped(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, wrapped

    ours = {
        f"f = {mix:g}": build(JumpLoraConfig(r=8, target_modules=targets, init_weights=False), mix)
        for mix in (0.0, 0.7, 1.0)
    }
    providers = {"lora": build(LoraConfig(r=8, target_modules=targets))[0]}
    providers |= {name: step for name, (step, _) in ours.items()}
    providers["density"] = lambda: set_threshold(ours["f = 1"][1], "default", 0.02)  # threshold_update, not a step
    seconds, setting = interleave(providers, rounds), {"hidden": 1024, "layers": 8, "tokens": 512, "r": 8}
    density = {name: seconds[name] for name in ("f = 1", "density")}
    report("density step", setting, density, "f = 1")
    del seconds["density"]
    report("model", setting, seconds, "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quantile", "penalty", "model"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--memory", choices=["dense", "streamed", "by bits"], help="MiB of the quantile in this process"
    )
    args = parser.parse_args()
    if args.memory:
        print(peak_growth(finders()[0][args.memory]))
    elif args.what == "quantile":
        quantile(args.rounds)
    elif args.what == "model":
        model(args.rounds)
    else:
        for density in (0.05, 0.08, 0.13, 1.0):
            penalty(density, args.rounds)


if __name__ == "__main__":
    main()

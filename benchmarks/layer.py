"""One gated linear layer, forward and backward: against the frozen layer, PEFT's LoRA and the dense specification.

    python benchmarks/layer.py [--size 4096] [--rank 8] [--tokens 512] [--mix 0.7] [--density 0.02] [--dtype float32]
    python benchmarks/layer.py --full     # sizes 1024, 4096; ranks 8, 64, 512; tokens 128, 512, 4096; float32, bfloat16
    python benchmarks/layer.py --memory   # what one step adds to the memory of a fresh process

Providers: frozen (nn.Linear, gradient of x), lora (PEFT), eager (ops/naive.py), compiled (the same by torch.compile,
with --full), blocked, and triton and triton-fold where there is a GPU.
"""

import argparse
import itertools
import subprocess
import sys

import torch
from common import DEVICE, append, interleave, peak_growth, report
from torch import nn

from hf_jumplora.ops import gated_linear


def setup(size, rank, tokens, mix, density, dtype, compiled=False):
    """({provider: one step}, (the layer by backend, W)) of one setting; `density` of the entries lie above tau."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    linear = nn.Linear(size, size, bias=False, device=DEVICE, dtype=dtype).requires_grad_(False)
    weight = nn.init.normal_(linear.weight, std=0.02)
    A = (torch.randn(rank, size, device=DEVICE) * 0.02).requires_grad_()
    B = (torch.randn(size, rank, device=DEVICE) * 0.02).requires_grad_()
    magnitudes = (B.detach() @ A.detach()).abs().flatten()
    log_tau = magnitudes.kthvalue(max(1, round((1 - density) * size**2))).values.log().reshape(1).requires_grad_()
    del magnitudes
    x = torch.randn(tokens, size, device=DEVICE).to(dtype).requires_grad_()
    grad = torch.randn(tokens, size, device=DEVICE).to(dtype)
    lora = nn.Sequential(nn.Linear(size, size, bias=False, device="meta"))
    lora[0].weight = linear.weight
    lora = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=["0"]), lora)
    for part in (lora[0].lora_A, lora[0].lora_B):
        part.float()  # PEFT's adapters over a bf16 base are float32 (autocast_adapter_dtype)

    def gated(backend):
        return gated_linear(x, weight, None, A, B, log_tau, scaling=4.0, mix=mix, backend=backend)

    providers = {
        "frozen": lambda: linear(x).backward(grad),
        "lora": lambda: lora(x).backward(grad),
        "eager": lambda: gated("naive").backward(grad),
        "blocked": lambda: gated("blocked").backward(grad),
    }
    if compiled:
        step = torch.compile(lambda: gated("naive"))
        providers["compiled"] = lambda: step().backward(grad)
    if DEVICE == "cuda":
        providers["triton"] = lambda: gated("triton").backward(grad)
        providers["triton-fold"] = lambda: gated("triton-fold").backward(grad)
    return providers, (gated, weight)


def saved_bytes(gated, weight, backend: str) -> int:
    """Bytes of tensors of the weight's size that a forward pass keeps for the backward, the weight itself apart."""
    kept: dict[int, int] = {}

    def pack(tensor):
        if tensor.numel() == weight.numel() and tensor.data_ptr() != weight.data_ptr():
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gated(backend)
    return sum(kept.values())


def emulated(dtype: str) -> bool:
    """Whether this CPU has no products of this dtype: torch then takes minutes for one layer."""
    return DEVICE == "cpu" and dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def run(size, rank, tokens, mix, density, dtype, rounds=7, compiled=False, only=None) -> None:
    """Measure one setting."""
    providers, _ = setup(size, rank, tokens, mix, density, getattr(torch, dtype), compiled)
    baseline = "frozen"
    if emulated(dtype):
        baseline, only = "frozen float32", ("blocked",)
        frozen = setup(size, rank, tokens, mix, density, torch.float32)[0]["frozen"]
    providers = {name: step for name, step in providers.items() if only is None or name in only}
    if emulated(dtype):
        providers[baseline] = frozen
    setting = {"size": size, "r": rank, "tokens": tokens, "mix": mix, "density": density, "dtype": dtype}
    report("layer", setting, interleave(providers, rounds), baseline)


def measure_memory(provider: str, mix: float, dtype: str) -> None:
    """Print, for one step of a provider in this process: MiB by which its peak exceeds what was there before."""
    providers, (gated, weight) = setup(4096, 8, 512, mix, 0.02, getattr(torch, dtype))
    peak = peak_growth(providers[provider])
    saved = saved_bytes(gated, weight, {"eager": "naive"}.get(provider, "blocked")) >> 20
    print(f"{peak} {0 if provider in ('frozen', 'lora') else saved}")


def memory() -> None:
    """Peak memory of a step and bytes of [out, in] kept for the backward, each provider in a fresh process (Linux)."""
    for dtype, mix in itertools.product(("float32", "bfloat16"), (0.7, 1.0)):
        for provider in ("blocked",) if emulated(dtype) else ("frozen", "lora", "eager", "blocked"):
            command = [sys.executable, __file__, "--memory", provider, "--mix", str(mix), "--dtype", dtype]
            peak, saved = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
            setting = {"size": 4096, "r": 8, "tokens": 512, "mix": mix, "dtype": dtype, "provider": provider}
            append("memory", setting, peak_mib=int(peak), saved_mib=int(saved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"size": 4096, "rank": 8, "tokens": 512, "mix": 0.7, "density": 0.02, "dtype": "float32", "rounds": 7}
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--memory", nargs="?", const="all")
    args = parser.parse_args()
    if args.memory == "all":
        memory()
    elif args.memory:
        measure_memory(args.memory, args.mix, args.dtype)
    elif args.full:
        for size, rank, tokens, dtype in itertools.product(
            (1024, 4096), (8, 64, 512), (128, 512, 4096), ("float32", "bfloat16")
        ):
            run(size, rank, tokens, args.mix, args.density, dtype, args.rounds, compiled=True)
    else:
        run(args.size, args.rank, args.tokens, args.mix, args.density, args.dtype, args.rounds)


if __name__ == "__main__":
    main()

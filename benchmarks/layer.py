"""Forward and backward of one gated linear layer: ratios against the dense eager specification (ops/naive.py).

    python benchmarks/layer.py [--size 4096] [--rank 8] [--tokens 512] [--mix 0.7] [--rounds 7]

Also counts what is saved for the backward pass beyond x and the base weight.
"""

import argparse

import torch
from common import interleave, report
from torch import nn

from hf_jumplora.ops import gated_linear


def setup(size: int, rank: int, tokens: int, mix: float, dtype: torch.dtype):
    """({provider: one step}, bytes of [out, in] tensors saved for backward by each gated provider)."""
    torch.manual_seed(0)
    weight = (torch.randn(size, size) * 0.02).to(dtype)
    A = (torch.randn(rank, size) * 0.02).requires_grad_()
    B = (torch.randn(size, rank) * 0.02).requires_grad_()
    log_tau = (B.detach() @ A.detach()).abs().flatten()[:100_000].quantile(0.98).log().reshape(1).requires_grad_()
    x = torch.randn(tokens, size).to(dtype).requires_grad_()
    grad = torch.randn(tokens, size).to(dtype)

    def gated(backend):
        return gated_linear(x, weight, None, A, B, log_tau, scaling=4.0, mix=mix, backend=backend)

    providers = {name: (lambda name=name: gated(name).backward(grad)) for name in ("naive", "blocked")}
    providers["frozen"] = lambda: nn.functional.linear(x, weight).backward(grad)
    providers["lora"] = lambda: (nn.functional.linear(x, weight) + 4.0 * (x.float() @ A.T @ B.T).to(dtype)).backward(
        grad
    )

    saved = {}
    for name in ("naive", "blocked"):
        kept: dict[int, int] = {}

        def pack(tensor, kept=kept):
            if tensor.numel() == weight.numel() and tensor.data_ptr() != weight.data_ptr():
                kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gated(name)
        saved[name] = sum(kept.values())
    return providers, saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (("size", int, 4096), ("rank", int, 8), ("tokens", int, 512), ("mix", float, 0.7)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        providers, saved = setup(args.size, args.rank, args.tokens, args.mix, dtype)
        setting = {"size": args.size, "r": args.rank, "tokens": args.tokens, "mix": args.mix, "dtype": str(dtype)[6:]}
        report("layer", setting, interleave(providers, args.rounds), "naive")
        print("  [out, in] bytes saved for backward:", saved)


if __name__ == "__main__":
    main()

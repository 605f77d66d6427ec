"""Compiles every kernel for GPUs that are not here; prints registers, spills and shared memory, one line a kernel.

    python tests/kernels/compile_check.py [--fast] [--target sm_80 ...] [--kernel forward ...]

Exit code 1 when a kernel spills or takes more shared memory than the GPU has. To be run without TRITON_INTERPRET: the
interpreter accepts what no compiler does, so its tests prove nothing about registers.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# Fusing is Triton's default up to 3.9, and unset it warns.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jumplora_kernels import kernels, launch


KIB = 1024
TARGETS = {  # and the shared memory that one block may use
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
KERNELS = {name: getattr(kernels, f"{name}_kernel") for name in launch.TILES}
BY_TILES = ("forward", "grad_x", "grad_params")
FORMS: dict[str, set[str]] = {  # the pointers that are None; W^T is a W read through transposed strides
    "W, free": set(),
    "free": {"w_ptr"},
    "neither": {"w_ptr", "free_ptr"},
    "W^T, free": set(),
}
RANKS = {"tiles": [8, 16], "rows": [16, 512]}
FLOAT32_POINTERS = {"a_ptr", "b_ptr", "tau_ptr", "mix_ptr", "da_ptr", "db_ptr", "dtau_ptr", "dd_ptr"}
FLOATS = {"scaling", "half_bandwidth"}
DIVISIBLE = {"OUT", "IN", "stride_wo", "stride_wi"}  # by 16, as in real models: Triton compiles that case apart


def compile_kernel(name: str, target: GPUTarget, *, rank: int, dtype: str, form: str, tile: dict[str, int]) -> Any:
    """Compiles a kernel for x, W and y in `dtype`, A and B in float32."""
    kernel = KERNELS[name]
    settings = dict(tile)
    options = {option: settings.pop(option) for option in ("num_warps", "num_stages")}
    precision = "ieee" if target.backend == "hip" else "tf32x3"
    constants: dict[str, Any] = {**settings, "R": rank, "RC": launch.RANK_CHUNK, "GATE_PRECISION": precision}
    # ADD as where it is used: on top of the base's own product.
    constants |= {"UPCAST": False, "ADD": "w_ptr" in FORMS[form], **dict.fromkeys(FORMS[form])}
    if dtype == "fp32":
        constants |= {"x_ptr": None, "dy_ptr": None}  # the product with x is the library's
    # Triton makes a constant of an argument that is 1.
    constants["stride_wo" if form.startswith("W^T") else "stride_wi"] = 1
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            element = "fp32" if argument in FLOAT32_POINTERS else "u8" if argument == "free_ptr" else dtype
            signature[argument] = f"*{element}"
        else:
            signature[argument] = "fp32" if argument in FLOATS else "i32"
        if signature[argument] != "constexpr" and (argument.endswith("_ptr") or argument in DIVISIBLE):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def cases(names: list[str], targets: list[str], dtypes: list[str], fast: bool) -> Iterator[tuple]:
    """(kernel, target, rank, dtype, form, tile) of everything that `launch` can ask for, or of a subset.

    The subset: every kernel for every target with its first tile, in bf16, in the form with most pointers and the
    largest rank.
    """
    for name in names:
        kernel = KERNELS[name]
        ranks = RANKS["tiles" if name in BY_TILES else "rows"]
        forms = list(FORMS) if "w_ptr" in kernel.arg_names else ["free", "neither"]
        tiles = launch.TILES[name]
        if fast:
            dtypes, ranks, forms, tiles = ["bf16"], ranks[-1:], forms[:1], tiles[:1]
        for target, rank, dtype, form, tile in itertools.product(targets, ranks, dtypes, forms, tiles):
            if dtype != "fp32" or name not in BY_TILES:
                yield name, target, rank, dtype, form, tile


def resources(compiled: Any, target: GPUTarget) -> tuple[str, bool]:
    """What the kernel uses, in words, and whether it spills."""
    if target.backend == "hip":
        keys = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        found = {key: int(re.search(rf"\.{key}:\s*(\d+)", compiled.asm["amdgcn"])[1]) for key in keys}
        # Spilled scalar registers go to lanes of vector registers: no memory, so not counted as a spill.
        return (
            f"{found['vgpr_count']} vgpr, {found['sgpr_spill_count']} sgpr in lanes, "
            f"scratch {found['private_segment_fixed_size']} B",
            found["vgpr_spill_count"] > 0 or found["private_segment_fixed_size"] > 0,
        )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    # LOCAL stays 0 when ptxas spills; the spilled values are in STACK.
    return f"{registers} registers, stack {stack} B", int(stack) > 0


def check(case: tuple) -> bool:
    """Compile one case and print what it uses. Returns whether it spills or does not fit."""
    name, target_name, rank, dtype, form, tile = case
    target, shared_limit = TARGETS[target_name]
    start = time.perf_counter()
    compiled = compile_kernel(name, target, rank=rank, dtype=dtype, form=form, tile=tile)
    used, spills = resources(compiled, target)
    shared = compiled.metadata.shared
    bad = spills or shared > shared_limit
    shape = "x".join(str(tile[side]) for side in ("BT", "BO", "BI") if side in tile)
    print(
        f"{'FAIL' if bad else 'ok':4} {name:11} {target_name:6} r={rank:<3} {dtype:4} {form:9} "
        f"{shape:10} w{tile['num_warps']} s{tile['num_stages']}  {used}, shared {shared / KIB:.0f} KiB "
        f"({time.perf_counter() - start:.1f} s)",
        flush=True,
    )
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtype", nargs="*", choices=["bf16", "fp16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--fast", action="store_true", help="one case a kernel and target")
    arguments = parser.parse_args()
    found = [check(c) for c in cases(arguments.kernel, arguments.target, arguments.dtype, arguments.fast)]
    print(f"{len(found)} cases, {sum(found)} failed")
    return int(any(found))


if __name__ == "__main__":
    sys.exit(main())

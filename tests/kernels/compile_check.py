"""Compiles every kernel for GPUs that are not here; prints registers, spills and shared memory, one line a kernel.

    python tests/kernels/compile_check.py [--fast] [--target sm_80 ...] [--kernel forward ...]

Exit code 1 when a kernel spills or takes more shared memory than the GPU has. To be run without
TRITON_INTERPRET: the interpreter accepts what no compiler does, so its tests prove nothing about registers.
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
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jumplora_kernels import kernels, launch


KIB = 1024
# Bytes of stack a thread that are no spill: Triton 3.6 uses a few where 3.9 uses none.
FEW_BYTES = 0 if Version(triton.__version__) >= Version("3.9") else 32
TARGETS = {  # and the shared memory that one block may use
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
KERNELS = {name: getattr(kernels, f"{name}_kernel") for name in launch.TILES}
# kernel -> forms: the pointers that are None. W^T is a W read through transposed strides.
FORMS: dict[str, dict[str, set[str]]] = {
    "update_rows": {"W, free": set(), "neither": {"w_ptr", "free_ptr"}, "W^T, free": set()},
    "gate_grad": {  # of a layer, of a large rank, of a penalty
        "layer": {"left_ptr", "right_ptr"},
        "rows": {"left_ptr", "right_ptr", "da_ptr", "db_ptr"},
        "penalty": {"g_ptr", "free_ptr", "dtau_ptr"},
    },
    "sum_parts": {"all": set(), "no tau": {"parts_tau_ptr", "dtau_ptr"}},
    "penalty": {"all": set()},
}
RANKS = {"layer": [16, 8], "rows": [512, 17], "all": [70, 8]}
WIDTHS = [100, 64]  # k of a penalty
FLOATS = {"scaling", "half_bandwidth", "tau_factor"}
DIVISIBLE = {"OUT", "IN", "stride_wo", "stride_wi"}  # by 16, as in real models: Triton compiles that case apart


def compile_kernel(name: str, target: GPUTarget, *, rank: int, k: int, dtype: str, form: str, tile: dict) -> Any:
    """Compiles a kernel for x, W and y in `dtype`, everything else in float32."""
    kernel = KERNELS[name]
    settings = dict(tile)
    options = {option: settings.pop(option) for option in ("num_warps", "num_stages")}
    gate, thin = ("ieee", "ieee") if target.backend == "hip" else ("tf32x3", "tf32")
    precision = thin if form in ("penalty", "all") else gate
    constants: dict[str, Any] = {**settings, "R": rank, "RC": launch.RANK_CHUNK, "GATE_PRECISION": gate}
    constants |= {"PRECISION": precision, "K": k, "KP": triton.next_power_of_2(k), "ADD": True}
    constants |= dict.fromkeys(FORMS[name][form])
    # Triton makes a constant of an argument that is 1.
    constants["stride_wo" if form.startswith("W^T") else "stride_wi"] = 1
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            element = "u8" if argument == "free_ptr" else dtype if argument in ("w_ptr", "rows_ptr") else "fp32"
            signature[argument] = f"*{element}"
        else:
            signature[argument] = "fp32" if argument in FLOATS else "i32"
        if signature[argument] != "constexpr" and (argument.endswith("_ptr") or argument in DIVISIBLE):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def cases(names: list[str], targets: list[str], dtypes: list[str], fast: bool) -> Iterator[tuple]:
    """(kernel, target, rank, k, dtype, form) of everything that `launch` can ask for, or of a subset.

    The subset: every kernel for every target, in bf16, in each form with most pointers and the largest rank.
    """
    for name, target in itertools.product(names, targets):
        for form in FORMS[name]:
            ranks = RANKS.get(form, RANKS["all"])
            widths = WIDTHS if "K" in KERNELS[name].arg_names and form in ("penalty", "all") else [1]
            types = dtypes if name == "update_rows" else ["fp32"]
            if fast:
                ranks, widths, types = ranks[:1], widths[:1], types[:1]
            for rank, k, dtype in itertools.product(ranks, widths, types):
                yield name, target, rank, k, dtype, form
            if fast and name != "gate_grad":
                break


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
    return f"{registers} registers, stack {stack} B", int(stack) > FEW_BYTES


def check(case: tuple) -> bool:
    """Compile one case and print what it uses. Returns whether it spills or does not fit."""
    name, target_name, rank, k, dtype, form, *other = case
    tile = other[0] if other else launch.TILES[name] | (launch.OF_A_LAYER if form == "layer" else {})
    target, shared_limit = TARGETS[target_name]
    start = time.perf_counter()
    compiled = compile_kernel(name, target, rank=rank, k=k, dtype=dtype, form=form, tile=tile)
    used, spills = resources(compiled, target)
    shared = compiled.metadata.shared
    bad = spills or shared > shared_limit
    shape = "x".join(str(tile[side]) for side in ("BO", "BI", "BLOCK") if side in tile)
    print(
        f"{'FAIL' if bad else 'ok':4} {name:11} {target_name:6} r={rank:<3} k={k:<3} {dtype:4} {form:9} "
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

"""Compiles every kernel for GPUs that are not here; prints registers, spills and shared memory, one line a kernel.

    python tests/kernels/compile_check.py [--target sm_80 ...]

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
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
KERNELS = {
    "forward": kernels.forward_kernel,
    "grad_x": kernels.grad_x_kernel,
    "grad_params": kernels.grad_params_kernel,
}
FORMS: dict[str, set[str]] = {  # the pointers that are None; W^T is a W read through transposed strides
    "W, free": set(),
    "W": {"free_ptr"},
    "free": {"w_ptr"},
    "neither": {"w_ptr", "free_ptr"},
    "W^T, free": set(),
}
ELEMENT_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
FLOAT32_POINTERS = {"a_ptr", "b_ptr", "tau_ptr", "mix_ptr", "da_ptr", "db_ptr", "dtau_ptr"}
FLOATS = {"scaling", "half_bandwidth"}
DIVISIBLE = {"OUT", "IN", "stride_wo", "stride_wi"}  # by 16, as in real models: Triton compiles that case apart


def compile_kernel(name: str, target: GPUTarget, *, rank: int, dtype: str, form: str, tile: dict[str, int]) -> Any:
    """Compiles a kernel for x, W and y in `dtype`; `tile` overrides the default tile."""
    kernel = KERNELS[name]
    settings = {**launch.TILES[name, ELEMENT_SIZE[dtype]], **tile}
    options = {option: settings.pop(option) for option in ("num_warps", "num_stages")}
    constants: dict[str, Any] = {**settings, "R": rank, "PRECISION": "ieee", "UPCAST": False}
    constants |= dict.fromkeys(FORMS[form])
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--rank", nargs="*", type=int, default=[8, 64])
    parser.add_argument("--dtype", nargs="*", choices=ELEMENT_SIZE, default=["bf16"])
    parser.add_argument("--set", nargs="*", default=[], help="try another tile: BT=64 num_warps=4")
    arguments = parser.parse_args()
    tile = {name: int(value) for name, value in (pair.split("=") for pair in arguments.set)}

    cases = itertools.product(arguments.kernel, arguments.rank, FORMS, arguments.dtype, arguments.target)
    failed = False
    for name, rank, form, dtype, target_name in cases:
        if name == "grad_params" and form not in ("free", "neither"):
            continue  # it does not read W
        target, shared_limit = TARGETS[target_name]
        compiled = compile_kernel(name, target, rank=rank, dtype=dtype, form=form, tile=tile)
        used, spills = resources(compiled, target)
        shared = compiled.metadata.shared
        bad = spills or shared > shared_limit
        failed |= bad
        print(
            f"{'FAIL' if bad else 'ok':4} {name:11} r={rank:<3} {dtype:4} {form:9} {target_name:6} {used}, "
            f"shared {shared / KIB:.0f} KiB",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

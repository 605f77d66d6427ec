"""What costs time on a GPU, counted on a CPU: operations dispatched, kernels launched, waits for the device."""

import traceback
from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


# Each makes the host wait until the device has done all it was asked for: a number, a size that depends on values, or
# values on the CPU.
WAITS = (
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "equal", "unique", "_unique2", "bincount",
    "repeat_interleave.Tensor",
)  # fmt: skip


def _caller() -> str:
    """File and line of the first frame that is not torch's own."""
    for frame in reversed(traceback.extract_stack(limit=40)[:-2]):
        if "/torch/" not in frame.filename:
            return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
    return "torch"


class Count(TorchDispatchMode):
    """Inside: `operations` counts dispatched operations and kernel launches.

    `waits` counts those that would wait on a GPU, by file and line.
    Views cost nothing on the device, but time to dispatch: they count. An index by a boolean tensor is a `nonzero`.
    """

    def __init__(self):
        super().__init__()
        self.operations = 0
        self.by_name: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def launched(self, name: str) -> None:
        """Count one launch of a kernel that is not an operation of torch."""
        self.operations += 1
        self.by_name[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.launched(name)
        if name in WAITS or str(func).removeprefix("aten.") in WAITS:
            self.waits[_caller()] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = args[1] if len(args) > 1 else ()
            if any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.waits[_caller()] += 1
        return func(*args, **(kwargs or {}))


# What each kernel writes: the places of these tensors among its arguments.
WRITTEN = {"update_rows": (6,), "gate_grad": (0, 8, 9, 10), "sum_parts": (4, 5, 6), "penalty": (6,)}


@contextmanager
def counted_kernels(count: Count, package):
    """Inside, a launch of one of `jumplora_kernels` counts as one operation, and writes zeros in place of its work."""
    launch = package.launch._launch

    def counting(name, grid, x, *arguments, **options):
        count.launched(f"kernel {name}")
        with _disable_current_modes():
            for place in WRITTEN[name]:
                if arguments[place] is not None:
                    arguments[place].zero_()

    package.launch._launch = counting
    try:
        yield
    finally:
        package.launch._launch = launch

"""The kernels for tests: native where there is a GPU, else a private copy of the package in Triton's interpreter."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hf_jumplora.ops import dispatch


NAME = "jumplora_kernels"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _take_modules() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == NAME}


@contextlib.contextmanager
def kernels_package() -> Iterator[ModuleType]:
    """The package, which is also what `import jumplora_kernels` gives inside of the block.

    Triton reads TRITON_INTERPRET when a kernel is decorated, so a copy that another test imported is of no use, and
    neither are the functions of Triton's own library that are kernels themselves.
    """
    if DEVICE == "cuda":
        yield importlib.import_module(NAME)
        return
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in ("sum", "zeros"):
            function = getattr(triton.language, name)
            if isinstance(function, triton.JITFunction):
                patch.setattr(triton.language, name, InterpretedFunction(function.fn))
        patch.syspath_prepend(Path(__file__).parents[1] / "kernels")
        others = _take_modules()
        dispatch._choose.cache_clear()
        try:
            yield importlib.import_module(NAME)
        finally:
            _take_modules()
            sys.modules.update(others)
            dispatch._choose.cache_clear()

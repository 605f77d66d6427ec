"""Triton kernels for JumpLoRA layers: `forward`, `backward` and `penalty` of gated low-rank linear layers.

Imports torch and triton only. Without triton the package still imports, and `is_available()` is False.
"""

from importlib.util import find_spec
from typing import Any


if find_spec("triton") is None:

    def is_available(device: Any) -> bool:
        return False

    __all__ = ["is_available"]
else:
    from .launch import backward, forward, is_available, penalty, product

    __all__ = ["backward", "forward", "is_available", "penalty", "product"]

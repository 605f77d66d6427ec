"""The arithmetic of one gated linear layer. Needs torch only."""

from .dispatch import gated_linear


__all__ = ["gated_linear"]

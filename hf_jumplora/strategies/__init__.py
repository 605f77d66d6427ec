"""What a continual-learning method adds to the loss and remembers between tasks. One file a method."""

from .base import Strategy
from .ella import Ella


__all__ = ["Ella", "Strategy"]

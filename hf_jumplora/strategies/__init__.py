"""What a continual-learning method adds to the loss and remembers between tasks. One file a method."""

from .base import Strategy
from .ella import Ella
from .gorp import Gorp
from .kfac import KFac
from .migu import Migu
from .nullspace import NullSpace
from .slao import Slao


__all__ = ["Ella", "Gorp", "KFac", "Migu", "NullSpace", "Slao", "Strategy"]

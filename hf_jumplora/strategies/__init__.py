"""What a continual-learning method adds to the loss and remembers between tasks: one file per method, or per family."""

from .base import LayerSize, Strategy
from .drift import Drift
from .ella import Ella
from .ewc import Ewc
from .gorp import Gorp
from .ilora import ILora
from .kfac import KFac
from .l2 import L2
from .loraga import LoraGA
from .lorasb import LoraSB
from .lwf import Lwf
from .migu import Migu
from .mora import Mora, SMoRA
from .nlora import NLora
from .nullspace import NullSpace
from .olora import OLora
from .osf import Osf
from .ranks import CoDyRA, DyLora, SoRA
from .replay import Replay
from .rounds import Boost, Dps, Squeeze
from .sema import Sema
from .slao import Slao
from .unlearn import Unlearn


__all__ = [
    "L2",
    "Boost",
    "CoDyRA",
    "Dps",
    "Drift",
    "DyLora",
    "Ella",
    "Ewc",
    "Gorp",
    "ILora",
    "KFac",
    "LayerSize",
    "LoraGA",
    "LoraSB",
    "Lwf",
    "Migu",
    "Mora",
    "NLora",
    "NullSpace",
    "OLora",
    "Osf",
    "Replay",
    "SMoRA",
    "Sema",
    "Slao",
    "SoRA",
    "Squeeze",
    "Strategy",
    "Unlearn",
]

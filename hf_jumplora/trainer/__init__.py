"""Training: one task (`ContinualTrainer`), a sequence of tasks (`ContinualRun`), and what they are made of."""

from .arguments import ContinualTrainingArguments
from .callbacks import GateCallback
from .router import train_router
from .run import ContinualRun
from .scoring import evaluate_task
from .task_trainer import ContinualMixin, ContinualSeq2SeqTrainer, ContinualTrainer, make_continual


__all__ = [
    "ContinualMixin",
    "ContinualRun",
    "ContinualSeq2SeqTrainer",
    "ContinualTrainer",
    "ContinualTrainingArguments",
    "GateCallback",
    "evaluate_task",
    "make_continual",
    "train_router",
]


def __getattr__(name: str):
    if name == "ContinualSFTTrainer":  # TRL is an extra, and slow to import
        try:
            from trl import SFTTrainer
        except ImportError as error:
            raise ImportError("ContinualSFTTrainer needs TRL: pip install trl") from error
        return make_continual(SFTTrainer)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

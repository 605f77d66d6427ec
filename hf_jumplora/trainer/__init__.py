"""Training: one task (`ContinualTrainer`), a sequence of tasks (`ContinualRun`), and what they are made of."""

from .arguments import ContinualTrainingArguments
from .evaluation import evaluate_task
from .mixin import ContinualMixin, ContinualSeq2SeqTrainer, ContinualTrainer, GateCallback, make_continual
from .run import ContinualRun
from .streams import load_tasks
from .tasks import LanguageModelTask, Task, TextTask


__all__ = [
    "ContinualMixin",
    "ContinualRun",
    "ContinualSeq2SeqTrainer",
    "ContinualTrainer",
    "ContinualTrainingArguments",
    "GateCallback",
    "LanguageModelTask",
    "Task",
    "TextTask",
    "evaluate_task",
    "load_tasks",
    "make_continual",
]


def __getattr__(name: str):
    if name == "ContinualSFTTrainer":  # TRL is an extra, and slow to import
        try:
            from trl import SFTTrainer
        except ImportError as error:
            raise ImportError("ContinualSFTTrainer needs TRL: pip install 'hf-jumplora[trl]'") from error
        return make_continual(SFTTrainer)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

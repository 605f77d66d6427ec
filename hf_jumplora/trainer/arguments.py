"""`ContinualTrainingArguments`: `TrainingArguments` and what a sequence of tasks needs on top."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import Seq2SeqTrainingArguments


@dataclass
class ContinualTrainingArguments(Seq2SeqTrainingArguments):
    """Arguments of [`ContinualTrainer`], [`ContinualSeq2SeqTrainer`] and [`ContinualRun`]; the Trainer's own work too.

    Raises:
        ValueError: an option has a value it cannot have.
    """

    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the thresholds; None: that of everything else (published)."}
    )
    max_length: int = field(
        default=512, metadata={"help": "Tokens of prompt and answer; longer texts are cut, never the instruction."}
    )
    eval_mode: Literal["generate", "score"] = field(
        default="generate",
        metadata={
            "help": "How text tasks are scored: 'generate' compares the greedy answer (the papers' metric), 'score' "
            "takes the label of highest likelihood."
        },
    )
    eval_tasks: Literal["all", "seen"] = field(
        default="all", metadata={"help": "After each task evaluate all tasks of the stream, or those trained so far."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("eval_mode", ("generate", "score")), ("eval_tasks", ("all", "seen"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, got {getattr(self, name)!r}")
        if self.max_length < 8:
            raise ValueError(f"max_length = {self.max_length} leaves no room for a prompt")
        if self.gate_learning_rate is not None and self.gate_learning_rate <= 0:
            raise ValueError(f"gate_learning_rate must be positive, got {self.gate_learning_rate}")

"""The old name of `hf_jumplora.data`, for one version."""

import warnings

from ..data import Encoder, LanguageModelTask, Task, TextTask, collate


warnings.warn("hf_jumplora.trainer.tasks is hf_jumplora.data now", FutureWarning, stacklevel=2)

__all__ = ["Encoder", "LanguageModelTask", "Task", "TextTask", "collate"]

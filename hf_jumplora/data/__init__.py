"""Data: tasks, the streams that list them, and the way from a text to token ids."""

from .encoder import Encoder, collate, pad_rows
from .streams import load_tasks
from .tasks import LanguageModelTask, Task, TextTask, row_count


__all__ = ["Encoder", "LanguageModelTask", "Task", "TextTask", "collate", "load_tasks", "pad_rows", "row_count"]

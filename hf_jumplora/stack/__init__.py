"""Finished tasks on disk: the manifest, one folder per task, loading them, and operating on whole stacks."""

from .export import export_lora, export_sparse, read_sparse
from .load import load_stack
from .manifest import Manifest, read_manifest, write_manifest
from .merge import merge_stack
from .operations import diff, remove, reorder, subset
from .recover import recover
from .save import save_task
from .squeeze import squeeze
from .switch import switch_tasks
from .verify import verify_stack


__all__ = [
    "Manifest",
    "diff",
    "export_lora",
    "export_sparse",
    "load_stack",
    "merge_stack",
    "read_manifest",
    "read_sparse",
    "recover",
    "remove",
    "reorder",
    "save_task",
    "squeeze",
    "subset",
    "switch_tasks",
    "verify_stack",
    "write_manifest",
]

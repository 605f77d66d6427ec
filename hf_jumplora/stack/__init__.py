"""Finished tasks on disk: the manifest, one folder a task, and loading them."""

from .load import load_stack
from .manifest import Manifest, read_manifest, write_manifest
from .save import save_task


__all__ = ["Manifest", "load_stack", "read_manifest", "save_task", "write_manifest"]

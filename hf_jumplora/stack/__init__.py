"""Finished tasks on disk: the manifest, one folder a task, and loading them."""

from .load import load_stack
from .manifest import Manifest, read_manifest
from .save import save_task, write_manifest


__all__ = ["Manifest", "load_stack", "read_manifest", "save_task", "write_manifest"]

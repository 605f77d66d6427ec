"""Reading finished tasks from disk: a layer at a time, and without their base model."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..ops.sparse import add_at, decode_index, decode_support, support_sha256
from ..tuner.model import rank_and_alpha
from ..tuner.rank_routing import refuse_competing
from .manifest import Manifest
from .verify import check_task, name_in_errors


_PREFIX = "base_model.model."


class TaskFile:
    """One finished task of a stack in a folder, verified by `open_stack`. A layer's tensors are read when asked for.

    Raises:
        ValueError: the file does not hold what a task's should; the message names it.
    """

    def __init__(self, folder: Path, entry: dict[str, Any], manifest: Manifest):
        self.name, self.folder = entry["name"], entry["folder"]
        self.path = folder / self.folder / "adapter_model.safetensors"
        self.config = check_task(folder, entry, manifest)
        with name_in_errors(self.path):
            self._file = safe_open(self.path, "pt")
        self.shapes = {name: (rows, columns) for name, (rows, columns) in manifest.base_model["layers"].items()}
        # Modules trained in full (`modules_to_save`) and trained token embeddings: no sum of low-rank updates.
        self.others = sorted(key for key in self._file.keys() if ".jumplora_" not in key)  # noqa: SIM118

    def key(self, layer: str, name: str) -> str:
        """The name in the file of a layer's "A" [r, in], "B" [out, r] or "support"."""
        return f"{_PREFIX}{layer}.jumplora_{name}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the file."""
        return {key: self._file.get_tensor(key) for key in self._file.keys()}  # noqa: SIM118

    def _tensor(self, layer: str, name: str) -> torch.Tensor:
        return self._file.get_tensor(self.key(layer, name))

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r]."""
        return self._tensor(layer, "A"), self._tensor(layer, "B")

    def scaling(self, layer: str) -> float:
        """The factor of B A in the update."""
        r, alpha = rank_and_alpha(self.config, layer)
        return alpha / math.sqrt(r) if self.config.use_rslora else alpha / r

    def code(self, layer: str) -> torch.Tensor | None:
        """The coded support, uint8 [bytes], checked against its sha256; None for a task without a gate."""
        if not self.config.gate:
            return None
        code = self._tensor(layer, "support")
        assert self.config.support is not None  # checked with the shapes
        found, expected = support_sha256(code), self.config.support[layer][1]
        if found != expected:
            raise ValueError(f"{self.path}: the support of {layer} has sha256 {found}, its config says {expected}")
        return code

    def support(self, layer: str) -> torch.Tensor:
        """Which entries the update keeps: bool [out, in]."""
        code = self.code(layer)
        shape = self.shapes[layer]
        return torch.ones(shape, dtype=torch.bool) if code is None else decode_support(code, shape)

    def update(self, layer: str, factors: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """scaling * B A on the support: float32 [out, in], the same bits as the layer in memory adds.

        factors: (A, B) in place of the file's, with its scaling.
        """
        total = torch.zeros(self.shapes[layer], dtype=torch.float32)
        self.add_update(total, layer, factors)
        return total

    def add_update(
        self, total: torch.Tensor, layer: str, factors: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> None:
        """Add a layer's update to a float32 [out, in]. Raises ValueError if the task's ranks compete with others'."""
        refuse_competing(self.config.rank_routing, "squeezing, merging, exporting or comparing them")
        A, B = factors or self.factors(layer)
        scaling, code = self.scaling(layer), self.code(layer)
        if code is None:
            total += (B @ A).mul_(scaling)
        else:
            add_at(total, B @ A, decode_index(code, self.shapes[layer]), scaling)

    def sizes(self) -> dict[str, float]:
        """Bytes: `file` on disk, `factors` A and B in float32, `support` as coded, `entropy` that a code needs at least
        when the kept entries of a layer are independent; `kept` and `entries` count entries."""
        total = dict.fromkeys(("factors", "support", "entropy", "kept", "entries"), 0.0)
        for layer, (out_features, in_features) in self.shapes.items():
            n, code = out_features * in_features, self.code(layer)
            kept = n if code is None else len(decode_index(code, self.shapes[layer]))
            p = kept / n
            bits = -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
            total["factors"] += 4 * (self._tensor(layer, "A").numel() + self._tensor(layer, "B").numel())
            total["support"] += 0 if code is None else code.numel()
            total["entropy"] += n * bits / 8
            total["kept"] += kept
            total["entries"] += n
        return {"file": self.path.stat().st_size, **total}


def total_update(tasks: list[TaskFile], layer: str) -> torch.Tensor:
    """Sum of the updates of a layer in the order of the stack: float32 [out, in]."""
    shape = next(task.shapes[layer] for task in tasks if layer in task.shapes)
    total = torch.zeros(shape, dtype=torch.float32)
    for task in tasks:
        if layer in task.shapes:
            task.add_update(total, layer)
    return total


def refuse_full_weights(tasks: list[TaskFile], what: str) -> None:
    """Raise ValueError when a task holds more than low-rank updates, which `what` cannot carry."""
    for task in tasks:
        if task.others:
            raise ValueError(
                f"{task.path} holds weights trained in full ({task.others[0]}), which {what} cannot carry; use "
                "load_stack(..., merge=True).save_pretrained(...)"
            )

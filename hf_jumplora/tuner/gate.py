"""The gate: one threshold and its ramp, shared by the layers of its scope. And containers that stay in float32."""

import torch
from torch import nn


PUBLISHED_LOG_TAU = -4.7  # before the threshold is set from the updates' own quantile


class _Float32(nn.Module):
    """Follows `.to(device)` but never a change of dtype: in bf16 the support of an update would change."""

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class Float32ParameterDict(_Float32, nn.ParameterDict):
    """adapter name -> float32 parameter."""


class JumpGate(_Float32):
    """log_tau [1] float32 (the threshold is tau = exp(log_tau)) and the mix f [1] of the ramp.

    A module, not a bare parameter: one instance is registered in every layer of its scope, and a shared module keeps
    its tie under `.to()`, deepcopy and loading, a shared parameter does not. `mix` is a persistent buffer: a checkpoint
    in the middle of the ramp evaluates as it was trained, and torch.compile does not recompile when it changes.
    """

    log_tau: nn.Parameter
    mix: torch.Tensor

    def __init__(self):
        super().__init__()
        self.log_tau = nn.Parameter(torch.full((1,), PUBLISHED_LOG_TAU, dtype=torch.float32))
        self.register_buffer("mix", torch.zeros(1, dtype=torch.float32))
        self._known: tuple[torch.Tensor, int, float] | None = None

    def set_mix(self, f: float) -> None:
        """Set f on the device, and remember it here."""
        self.mix.fill_(f)
        self._known = (self.mix, self._mix_version(), f)

    @property
    def f(self) -> float:
        """The mix as a number. Waits for the device only when something other than [`set_mix`] has changed it."""
        if self._known is None or self._known[0] is not self.mix or self._known[1] != self._mix_version():
            self._known = (self.mix, self._mix_version(), self.mix.item())
        return self._known[2]

    def _mix_version(self) -> int:
        """Of the mix: grows when it is changed in place."""
        return -1 if self.mix.is_inference() else self.mix._version

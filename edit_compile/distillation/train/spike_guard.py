"""Finds steps that must be skipped: their loss or gradient is not finite, or the loss spikes."""

from __future__ import annotations

import math

from edit_compile.frozen import Frozen

_DECAY = 0.95
_STEPS_TO_TRUST = 20


class SpikeGuard(Frozen):
    """The recent average of a phase's loss, and the number of consecutive skipped steps. It is saved with the run."""

    loss_ema: float = 0.0
    steps: int = 0
    consecutive_skips: int = 0

    def after(self, loss: float, norm: float, spike_factor: float) -> tuple[SpikeGuard, str | None]:
        """Return the guard after a step, and why the step must be skipped, if it must.

        Args:
            spike_factor: a loss this many times the recent average is a spike.
        """
        reason = self._reason(loss, norm, spike_factor)
        if reason is not None:
            return self.model_copy(update={"consecutive_skips": self.consecutive_skips + 1}), reason
        loss_ema = loss if self.steps == 0 else _DECAY * self.loss_ema + (1 - _DECAY) * loss
        return SpikeGuard(loss_ema=loss_ema, steps=self.steps + 1), None

    def _reason(self, loss: float, norm: float, spike_factor: float) -> str | None:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(norm):
            return f"its gradient's norm is {norm}"
        if self.steps >= _STEPS_TO_TRUST and loss > spike_factor * self.loss_ema:
            return f"its loss {loss:.4g} is more than {spike_factor:g} times the recent {self.loss_ema:.4g}"
        return None

"""Steps that must not be taken: their loss or gradient is not finite, or the loss explodes."""

from __future__ import annotations

import math

from edit_compile.frozen import Frozen

_MEMORY = 0.95
_STEPS_TO_TRUST = 20


class Guard(Frozen):
    """What the losses have been like in this phase, and how many steps in a row were left out. Plain data; saved with the run."""

    typical: float = 0.0
    steps: int = 0
    skipped_in_a_row: int = 0

    def after(self, loss: float, norm: float, explosion: float) -> tuple[Guard, str | None]:
        """The guard after a step, and why the step must be left out, if it must."""
        reason = self._reason(loss, norm, explosion)
        if reason is not None:
            return self.model_copy(update={"skipped_in_a_row": self.skipped_in_a_row + 1}), reason
        typical = loss if self.steps == 0 else _MEMORY * self.typical + (1 - _MEMORY) * loss
        return Guard(typical=typical, steps=self.steps + 1), None

    def _reason(self, loss: float, norm: float, explosion: float) -> str | None:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(norm):
            return f"its gradient's norm is {norm}"
        if self.steps >= _STEPS_TO_TRUST and loss > explosion * self.typical:
            return f"its loss {loss:.4g} is more than {explosion:g} times the recent {self.typical:.4g}"
        return None

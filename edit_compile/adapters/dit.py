"""DiT, conditioned on class labels instead of captions."""

from __future__ import annotations

from typing import Any

from edit_compile.adapters.family import DiffusionFamily, InputSizes, Size


class DiT(DiffusionFamily):
    """The transformer of diffusers' DiTPipeline. Some models also predict the variance."""

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        return {
            "hidden_states": self.random_latents(model, sizes),
            "timestep": sizes.integers(),
            "class_labels": sizes.integers(),
            "return_dict": False,
        }

    def size_limit(self, model: Any, rows: int, columns: int) -> str | None:
        return None if rows == columns else "only square images"

    def example_grid(self, model: Any) -> Size:
        side = model.config.sample_size // model.config.patch_size
        return side, side


FAMILY = DiT()

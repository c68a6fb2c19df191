"""timm's vision transformers: classifiers of images of one size, without noise or text."""

from __future__ import annotations

from typing import Any

from edit_compile.adapters.family import Family, InputSizes, Size


class TimmViT(Family):
    """timm.models.vision_transformer.VisionTransformer."""

    def inputs(self, model: Any, sizes: InputSizes) -> dict[str, Any]:
        height, width = model.patch_embed.patch_size
        return {"x": sizes.floats(model.patch_embed.proj.in_channels, height * sizes.rows, width * sizes.columns)}

    def pixels_per_token(self, model: Any) -> int:
        return int(model.patch_embed.patch_size[0])

    def default_sizes(self, model: Any) -> tuple[Size, ...]:
        return (model.patch_embed.img_size,)

    def size_limit(self, model: Any, rows: int, columns: int) -> str | None:
        if (rows, columns) == self.example_grid(model):
            return None
        height, width = model.patch_embed.img_size
        return f"it was built for {height} x {width} px"

    def example_grid(self, model: Any) -> Size:
        rows, columns = model.patch_embed.grid_size
        return rows, columns


FAMILY = TimmViT()

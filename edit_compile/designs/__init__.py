"""Attention designs: what the compiler can rewrite a site's attention to, and the parts they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from edit_compile.config import LinearizeConfig
from edit_compile.designs.edit import Edit
from edit_compile.designs.mm_edit import MMEdit

if TYPE_CHECKING:
    from edit_compile.passes.rewrite import Additions


def build(additions: Additions, config: LinearizeConfig) -> nn.Module:
    """The module that a rewritten site gets."""
    if additions.design == "edit":
        return Edit(config, additions.channels)
    return MMEdit(
        config,
        additions.channels,
        heads=additions.heads,
        head_channels=additions.head_channels,
        scale=additions.scale,
        before=additions.before,
        after=additions.after,
    )

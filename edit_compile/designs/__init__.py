"""Attention designs: what the compiler can rewrite a site's attention to, and the parts they share."""

from edit_compile.designs.base import Additions, Design, design_names, find_design, register
from edit_compile.designs.edit import EDIT
from edit_compile.designs.mm_edit import MM_EDIT

register(EDIT)
register(MM_EDIT)

__all__ = ["Additions", "Design", "design_names", "find_design", "register"]

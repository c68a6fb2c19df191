"""edit_compile rewrites the softmax attention of diffusion transformers to linear compressed attention."""

from edit_compile.tokens import Grid, Segment, TokenKind, TokenLayout

__version__ = "0.1.0"

__all__ = ["Grid", "Segment", "TokenKind", "TokenLayout"]

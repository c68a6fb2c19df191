"""Token kinds, layouts and grids: the vocabulary in which passes and plans speak of a token axis. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TokenKind(StrEnum):
    """What a token stands for."""

    IMAGE = "image"
    TEXT = "text"
    OTHER = "other"  # class, register and time tokens: neither image nor text


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind. `length` is a number, or an expression in the sizes of the model's inputs."""

    kind: TokenKind
    length: str

    def __str__(self) -> str:
        return f"{self.kind} {self.length}"


@dataclass(frozen=True)
class TokenLayout:
    """The ordered segments along one token axis: `[image h*w, text t]`."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, *segments: tuple[TokenKind | str, str | int]) -> TokenLayout:
        return cls(tuple(Segment(TokenKind(kind), str(length)) for kind, length in segments))

    @property
    def kinds(self) -> tuple[TokenKind, ...]:
        """The kinds in order, each run once."""
        return tuple(s.kind for i, s in enumerate(self.segments) if i == 0 or s.kind != self.segments[i - 1].kind)

    def has(self, kind: TokenKind) -> bool:
        return any(s.kind is kind for s in self.segments)

    def only(self, kind: TokenKind) -> bool:
        return bool(self.segments) and all(s.kind is kind for s in self.segments)

    def __add__(self, other: TokenLayout) -> TokenLayout:
        return TokenLayout(self.segments + other.segments)

    def __str__(self) -> str:
        return "[" + ", ".join(map(str, self.segments)) + "]"


@dataclass(frozen=True)
class Grid:
    """The image tokens' (h, w), or (t, h, w) for video, row-major; each size a number or an expression."""

    sizes: tuple[str, ...]

    def __str__(self) -> str:
        return " x ".join(self.sizes)

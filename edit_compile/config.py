"""What the user chooses about a conversion."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, field_validator

from edit_compile.errors import ConfigError


class LinearizeConfig(BaseModel):
    """How attention is rewritten. The defaults are the paper's where it states one; see the README for the others.

    Attributes:
        design: a registered design's name; "auto" takes "edit" where attention is between image tokens alone and "mm-edit"
            where others take part.
        reduction: by how much ConvFusion's 3x3 convolution reduces the channels.
        query: "conv-fusion" (EDiT) or "plain", the model's own projection.
        key, value: "compressor" (EDiT), "conv-fusion" or "plain"; both compressed or neither, so that they stay paired.
        eta: the weight of linear attention against softmax over text. "ratio": N_I / (N_I + N_P) (MM-EDiT);
            "exact": by both parts' normalisers; "calibrated": a learned weight per head in the ratio.
        text_keys: whether text queries see "full" or "compressed" image keys.
        identity: start as close to the teacher as possible: ConvFusion adds nothing, the compressor samples.
        include, exclude: globs over module paths; a site is converted if it matches some of the first and none of the second.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    design: str = "auto"
    reduction: PositiveInt = 4
    query: Literal["conv-fusion", "plain"] = "conv-fusion"
    key: Literal["compressor", "conv-fusion", "plain"] = "compressor"
    value: Literal["compressor", "conv-fusion", "plain"] = "compressor"
    eta: Literal["ratio", "exact", "calibrated"] = "exact"
    text_keys: Literal["full", "compressed"] = "full"
    identity: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    @field_validator("design")
    @classmethod
    def _registered(cls, name: str) -> str:
        from edit_compile.designs import design_names  # the designs are configured by this class

        if name not in ("auto", *design_names()):
            raise ValueError(f"no such design; there are: auto, {', '.join(design_names())}")
        return name

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise ConfigError("; ".join(_in_words(e) for e in error.errors())) from None
        if (self.key == "compressor") != (self.value == "compressor"):
            raise ConfigError(f"key={self.key!r} and value={self.value!r}: compress both or neither, keys and values are paired")


def _in_words(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown option {name!r}; there are: {', '.join(LinearizeConfig.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}={problem['input']!r}: {message[0].lower()}{message[1:]}"

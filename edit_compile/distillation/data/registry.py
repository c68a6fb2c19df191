"""Kinds of data: each is a class that holds its section of the recipe and opens the source it describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SerializeAsAny, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema
from torch import nn

from edit_compile.distillation.data.cache.write import Producer
from edit_compile.distillation.data.source import DataSource, SourceContext
from edit_compile.distillation.registry import Registry
from edit_compile.errors import ConfigError, DistillError, suggestion
from edit_compile.frozen import Frozen


class DataConfig(Frozen):
    """The `data` section of a recipe. A subclass is one kind: it has a literal `kind`, its options, and `open`."""

    kind: str
    """Selects the kind of data."""

    random_weights: ClassVar[bool] = False  # whether a model without weights may be trained on it, with random ones
    recorded_calls: ClassVar[bool] = False  # whether it has calls of the model instead of images: its source is a `CallSource`
    sampled_by_teacher: ClassVar[bool] = False  # whether the teacher's weights and the seed decide on the samples

    @property
    def video_frames(self) -> int | None:
        """The number of frames of its videos where a stage does not say it; None if that is not known."""
        return None

    @property
    def pipeline_options(self) -> Mapping[str, Any]:
        """Keyword arguments of the pipeline's call, of data that are its calls of the model."""
        return {}

    def check_model(self, model: nn.Module, base: str | None) -> None:
        """Accept a model, of which weights may be missing, if data of this kind can be made for it.

        Args:
            base: as of `SourceContext`.

        Raises:
            DistillError: no data of this kind fit the model.
        """

    def check_files(self, model: nn.Module) -> None:
        """Find out, without the model's weights, what can be known of the files: that they are there, and fit the model.

        Raises:
            DistillError: they are not, or do not.
        """

    def open(self, context: SourceContext) -> DataSource:
        """Open the source.

        Raises:
            DistillError: the data cannot be opened, or the model's encoders cannot be loaded.
        """
        raise NotImplementedError

    def producer(self, context: SourceContext, batch_size: int) -> Producer:
        """Return what encodes the samples for a cache, `batch_size` at a time.

        Raises:
            DistillError: there is nothing to encode, or it cannot be opened.
        """
        raise DistillError(f"data.kind: {self.kind} needs no cache: it can be trained on as it is")


Config = TypeVar("Config", bound=type[DataConfig])


def register_data(kind: str) -> Callable[[Config], Config]:
    """Make a decorator that registers a subclass of `DataConfig` for recipes with `data: {kind: ...}`.

    Packages may instead name the class in an entry point of the group `edit_compile.data`.
    """

    def register(config: Config) -> Config:
        if not (isinstance(config, type) and issubclass(config, DataConfig)):
            raise ConfigError(f"data of kind {kind!r} must be a subclass of DataConfig, not {config!r}")
        DATA.add(kind, config, f"{config.__module__}.{config.__qualname__}")
        return config

    return register


DATA: Registry[type[DataConfig]] = Registry("data", "edit_compile.data", lambda kind, config: register_data(kind)(config))


def data_kinds() -> tuple[str, ...]:
    """List the names of all kinds of data."""
    return DATA.names()


class _ByKind:
    """Validates a mapping as the class registered for its `kind`, and describes all of them in the JSON schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_parse, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        sections = [handler(DATA.get(kind).__pydantic_core_schema__) for kind in DATA.names()]
        for section in sections:
            section["properties"]["kind"].setdefault("description", DataConfig.model_fields["kind"].description)
        return {"oneOf": sections}


def _parse(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind = value.get("kind")
    if kind is None:
        raise _kind_error("missing", value)
    try:
        config = DATA.get(kind)
    except (KeyError, TypeError):
        words = suggestion(str(kind), DATA.names())
        raise _kind_error(PydanticCustomError("unknown_kind", "unknown kind of data; {words}", {"words": words}), kind) from None
    return config.model_validate(value)


def _kind_error(problem: str | PydanticCustomError, value: Any) -> ValidationError:
    return ValidationError.from_exception_data("data", [InitErrorDetails(type=problem, loc=("kind",), input=value)])


AnyData = Annotated[SerializeAsAny[DataConfig], _ByKind()]


def open_source(
    data: DataConfig,
    model: nn.Module,
    seed: int,
    *,
    base: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> DataSource:
    """Open the source that a recipe's `data` section describes.

    Args:
        model, seed, base: as of `SourceContext`.
        device, dtype: of the encoders. Default: the CPU.

    Raises:
        DistillError: the data cannot be opened, or the model's encoders cannot be loaded.
    """
    return data.open(SourceContext(model, seed, base, device or torch.device("cpu"), dtype))

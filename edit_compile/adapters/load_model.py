"""From a name to a model: demo models, built-in architectures, timm, local folders and the hub."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edit_compile.adapters.hub_access import download_error, hub_access, hub_errors, is_hub_error
from edit_compile.adapters.model_names import ARCHITECTURES, check_name, hub_id, with_revision
from edit_compile.adapters.module_limit import limited_modules
from edit_compile.adapters.pipelines import DENOISERS, PIPELINE_INDEX, dtype_kwarg
from edit_compile.demo import models as demo
from edit_compile.errors import ModelNotFoundError, first_line
from edit_compile.extras import need
from edit_compile.files import read_small
from edit_compile.tensor_files import DTYPES

_CONFIG = "config.json"
_SINGLE_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf", ".onnx")
# What a model's constructor, or a reader of weights, runs into where a file holds other things than it should.
_MALFORMED = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError)
_PLAIN_WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_VARIANT = re.compile(r"diffusion_pytorch_model\.(?:safetensors\.index\.)?(\w+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin|json)")


@dataclass(frozen=True)
class LoadedModel:
    """A transformer and where it came from.

    Attributes:
        source: the canonical id or absolute path, from which it can be loaded again.
        pipeline: the id or path of the whole pipeline, if the transformer is part of one.
        has_weights: False for structure only, on the meta device.
    """

    model: nn.Module
    source: str
    pipeline: str | None = None
    has_weights: bool = True


def load_model(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    structure_only: bool = False,
    random_weights: bool = False,
    revision: str | None = None,
) -> LoadedModel:
    """Load the transformer that a name stands for, in evaluation mode.

    Args:
        name: `demo/mm-dit`, `demo/dit`, `arch/NAME` (no weights), `timm/NAME`, a pipeline's or transformer's folder, a pipeline's
            `model_index.json`, a transformer's `config.json` (no weights), a hub id, or the address of its page. ORG/NAME@REVISION
            is a branch, a tag or a commit on the hub.
        dtype: to load the weights in; default: float32, as diffusers does.
        structure_only: load no weights, whatever the name: all parameters are on the meta device.
        random_weights: give what has no weights random ones, from torch's generator.
        revision: of what is on the hub, as in ORG/NAME@REVISION.

    Raises:
        ConfigError: a revision of what is not on the hub.
        ModelNotFoundError: nothing is found under the name, or the hub does not give the model; says what to do.
    """
    name = with_revision(name, revision)
    check_name(name)
    kind, _, rest = name.partition("/")
    path = Path(name).expanduser()
    if kind == "demo":
        return LoadedModel(_from_folder(demo.folder(rest), dtype, structure_only), name, None, not structure_only)
    if kind == "arch":
        return _without_weights(ARCHITECTURES / f"{rest}.json", name, random_weights and not structure_only, dtype)
    if kind == "timm":
        return LoadedModel(_from_timm(rest, dtype, structure_only), name, None, not structure_only)
    # Those of Path raise where a name is too long for a file.
    is_file, is_dir = os.path.isfile(path), os.path.isdir(path)  # noqa: PTH112, PTH113
    if is_file and path.name == PIPELINE_INDEX:
        return _from_local(path.resolve().parent, dtype, structure_only)
    if path.suffix.lower() in _SINGLE_FILES and is_file:
        raise ModelNotFoundError(
            f"{path} is a single file of weights: load it with diffusers' from_single_file, save_pretrained it, and give that folder"
        )
    if is_file:
        return _without_weights(path, str(path.resolve()), random_weights and not structure_only, dtype)
    if is_dir:
        return _from_local(path.resolve(), dtype, structure_only)
    return _from_hub(name, dtype, structure_only)


def _from_local(folder: Path, dtype: torch.dtype | None, structure_only: bool) -> LoadedModel:
    is_pipeline = (folder / PIPELINE_INDEX).is_file()
    parts = [folder / name for name in DENOISERS] if is_pipeline else [folder]
    inner = next((part for part in parts if (part / _CONFIG).is_file()), None)
    if inner is None:
        raise ModelNotFoundError(
            f"{parts[0]} has no config.json: {folder} is neither a pipeline with a transformer or UNet nor a transformer"
        )
    model = _from_folder(inner, dtype, structure_only)
    return LoadedModel(model, str(folder), str(folder) if is_pipeline else None, not structure_only)


def _without_weights(config: Path, source: str, random_weights: bool, dtype: torch.dtype | None) -> LoadedModel:
    model = _from_config(config, "cpu" if random_weights else "meta")
    return LoadedModel(model.to(dtype) if random_weights and dtype is not None else model, source, None, random_weights)


def _from_config(path: Path, device: str = "meta") -> nn.Module:
    config = _read_config(path)
    try:
        with torch.device(device), limited_modules(config):
            model: nn.Module = _class_of(config, path).from_config(config)
    except _MALFORMED as error:
        raise ModelNotFoundError(f"{path}: no {config['_class_name']} can be made of it: {first_line(error)}") from error
    return model.eval()


def _from_folder(folder: Path, dtype: torch.dtype | None, structure_only: bool) -> nn.Module:
    path = folder / _CONFIG
    if structure_only:
        return _from_config(path)
    config = _read_config(path)
    model_class = _class_of(config, folder)
    try:
        variant = _variant_in(folder)
        _require_stored_as_floats(folder)
        with limited_modules(config):
            return _pretrained(model_class, folder, dtype, variant=variant)
    except ModelNotFoundError:
        raise
    except (OSError, SafetensorError, *_MALFORMED) as error:
        _from_config(path)  # says so where this is at fault
        raise ModelNotFoundError(f"{folder}: the weights cannot be read: {first_line(error)}") from error


def _pretrained(model_class: Any, name: str | Path, dtype: torch.dtype | None, **options: Any) -> nn.Module:
    """Load a model with its weights.

    Raises:
        ModelNotFoundError: some of its parameters are in no file.
        OSError, ValueError, SafetensorError: they cannot be read, or are of other shapes.
    """
    model, found = model_class.from_pretrained(name, output_loading_info=True, **dtype_kwarg(dtype), **options)
    missing = sorted(dict(model.named_parameters()).keys() & set(found["missing_keys"]))
    if missing:
        raise ModelNotFoundError(
            f"{name}: {len(missing)} parameters of {model_class.__name__} are in no file of weights, the first of them {missing[0]}: "
            "the files are incomplete, or another model's"
        )
    return cast("nn.Module", model.eval())


def _require_stored_as_floats(folder: Path) -> None:
    """Refuse whole numbers in the place of a model's weights, as quantization leaves them beside scales that nothing here knows.

    Raises:
        ModelNotFoundError: there are such.
    """
    stored: dict[str, tuple[Path, str]] = {}
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        file: Any
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:  # who loads the weights says what is wrong with a file
            stored |= {name: (path, file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    whole = {name for name, (_, kind) in stored.items() if kind in DTYPES and not DTYPES[kind].is_floating_point}
    for name, parameter in _from_config(folder / _CONFIG).named_parameters() if whole else ():  # most models have none
        if name in whole and parameter.is_floating_point():
            path, kind = stored[name]
            raise ModelNotFoundError(f"{path}: {name} is stored in whole numbers ({kind}): it is quantized, and its scales are not known")


def _variant_in(folder: Path) -> str | None:
    """Return the variant of a folder's weights (fp16) if there are none without one.

    Raises:
        ModelNotFoundError: there are no weights, or in what cannot hold any.
    """
    files = sorted(folder.glob("diffusion_pytorch_model*"))
    if (strange := next((file for file in files if not file.is_file()), None)) is not None:
        raise ModelNotFoundError(f"{strange} is not a regular file, or a link to nowhere")
    names = [file.name for file in files]
    if any(_PLAIN_WEIGHTS.fullmatch(name) for name in names):
        return None
    variants = [found[1] for name in names if (found := _VARIANT.fullmatch(name))]
    if not variants:
        raise ModelNotFoundError(f"{folder} has no weights (diffusion_pytorch_model.safetensors); its {_CONFIG} alone gives the structure")
    return variants[0]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelNotFoundError(f"{path} is not a model's config: it is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelNotFoundError(f"{path} is not a model's config: it holds a {type(config).__name__}")
    return config


def _class_of(config: dict[str, Any], where: Path | str) -> Any:
    import diffusers

    name = config.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ModelNotFoundError(f"{where}: diffusers {diffusers.__version__} has no model class {name!r}")
    return found


def _from_timm(name: str, dtype: torch.dtype | None, structure_only: bool) -> nn.Module:
    need("timm", f"timm/{name}")
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise ModelNotFoundError(f"timm {timm.__version__} has no model {name!r}; timm.list_models() lists them")
    model: nn.Module
    if structure_only:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        return model.eval()
    with hub_access() as online:
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:
            if not is_hub_error(error) and not isinstance(error, RuntimeError):
                raise
            raise download_error(f"timm/{name}", error, online) from error
    return model.to(dtype or torch.float32).eval()


def _denoiser_config(repository: str, revision: str | None) -> tuple[str, Path]:
    """Download the config of a hub pipeline's denoiser; returns also the component's name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    first, *others = DENOISERS
    try:
        return first, Path(hf_hub_download(repository, f"{first}/config.json", revision=revision))
    except EntryNotFoundError as missing:
        for other in others:
            try:
                return other, Path(hf_hub_download(repository, f"{other}/config.json", revision=revision))
            except EntryNotFoundError:
                continue
        raise missing


def _from_hub(name: str, dtype: torch.dtype | None, structure_only: bool) -> LoadedModel:
    repository, revision = hub_id(name)
    source = repository if revision is None else f"{repository}@{revision}"
    nothing = f"has no {DENOISERS[0]}/config.json: it is not a pipeline with a transformer. edit_compile.load reads converted models"
    with hub_errors(source, nothing):
        part, config = _denoiser_config(repository, revision)
        if structure_only:
            return LoadedModel(_from_config(config), source, source, False)
        written = _read_config(config)
        try:
            with limited_modules(written):
                model = _pretrained(_class_of(written, source), repository, dtype, subfolder=part, revision=revision)
        except (SafetensorError, *_MALFORMED) as error:
            if is_hub_error(error):
                raise
            raise ModelNotFoundError(f"{source}: the weights cannot be read: {first_line(error)}") from error
        return LoadedModel(model, source, source)

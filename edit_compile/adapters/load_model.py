"""From a name to a model: demo models, built-in architectures, timm, local folders and the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edit_compile.adapters.hub_access import ALIASES, download_error, first_line, hub_access
from edit_compile.adapters.pipelines import DENOISERS, dtype_kwarg
from edit_compile.demo import models as demo
from edit_compile.errors import ModelNotFoundError

_ARCHITECTURES = Path(__file__).parent / "arch"


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


def architectures() -> tuple[str, ...]:
    """List the built-in full-size architectures, NAME of `arch/NAME`."""
    return tuple(sorted(path.stem for path in _ARCHITECTURES.glob("*.json")))


def load_model(name: str, *, dtype: torch.dtype | None = None, structure_only: bool = False, random_weights: bool = False) -> LoadedModel:
    """Load the transformer that a name stands for, in evaluation mode.

    Args:
        name: `demo/mm-dit`, `demo/dit`, `arch/NAME` (no weights), `timm/NAME`, a pipeline's or transformer's folder, a
            transformer's `config.json` (no weights), or a hub id.
        dtype: to load the weights in; default: float32, as diffusers does.
        structure_only: load no weights, whatever the name: all parameters are on the meta device.
        random_weights: give what has no weights random ones, from torch's generator.

    Raises:
        ModelNotFoundError: nothing is found under the name, or the hub does not give the model; says what to do.
    """
    kind, _, rest = name.partition("/")
    path = Path(name).expanduser()
    if kind == "demo":
        return LoadedModel(_from_demo(rest, dtype, structure_only), name, None, not structure_only)
    if kind == "arch":
        if rest not in architectures():
            raise ModelNotFoundError(f"no built-in architecture {rest!r}; there are: {', '.join(architectures())}")
        return _without_weights(_ARCHITECTURES / f"{rest}.json", name, random_weights and not structure_only, dtype)
    if kind == "timm":
        return LoadedModel(_from_timm(rest, dtype, structure_only), name, None, not structure_only)
    if path.is_file():
        return _without_weights(path, str(path.resolve()), random_weights and not structure_only, dtype)
    if path.is_dir():
        return _from_local(path.resolve(), dtype, structure_only)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelNotFoundError(f"{name} does not exist; give a folder, a config.json, demo/NAME, arch/NAME, timm/NAME or a hub id")
    return _from_hub(ALIASES.get(name, name), dtype, structure_only)


def _from_demo(name: str, dtype: torch.dtype | None, structure_only: bool) -> nn.Module:
    there_are = [known for known in demo.NAMES if (demo.folder(known) / "config.json").is_file()]
    if name not in there_are:
        raise ModelNotFoundError(f"no demo model {name!r}; there are: {', '.join(there_are)}")
    return _from_folder(demo.folder(name), dtype, structure_only)


def _from_local(folder: Path, dtype: torch.dtype | None, structure_only: bool) -> LoadedModel:
    is_pipeline = (folder / "model_index.json").is_file()
    parts = [folder / name for name in DENOISERS] if is_pipeline else [folder]
    inner = next((part for part in parts if (part / "config.json").is_file()), None)
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
    with torch.device(device):
        model: nn.Module = _class_of(config, path).from_config(config)
    return model.eval()


def _from_folder(folder: Path, dtype: torch.dtype | None, structure_only: bool) -> nn.Module:
    path = folder / "config.json"
    if structure_only:
        return _from_config(path)
    model_class = _class_of(_read_config(path), folder)
    try:
        model: nn.Module = model_class.from_pretrained(folder, **dtype_kwarg(dtype))
    except OSError as error:
        raise ModelNotFoundError(f"{folder}: the weights cannot be read: {first_line(error)}") from error
    return model.eval()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ModelNotFoundError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelNotFoundError(f"{path} is not a model's config: it holds a {type(config).__name__}")
    return config


def _class_of(config: dict[str, Any], where: Path | str) -> Any:
    import diffusers

    name = config.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None:
        raise ModelNotFoundError(f"{where}: diffusers {diffusers.__version__} has no model class {name!r}")
    return found


def _from_timm(name: str, dtype: torch.dtype | None, structure_only: bool) -> nn.Module:
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
        except (OSError, RuntimeError) as error:
            raise download_error(f"timm/{name}", error, online) from error
    return model.to(dtype or torch.float32).eval()


def _denoiser_config(name: str) -> tuple[str, Path]:
    """Download the config of a hub pipeline's denoiser; returns also the component's name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    first, *others = DENOISERS
    try:
        return first, Path(hf_hub_download(name, f"{first}/config.json"))
    except EntryNotFoundError as missing:
        for other in others:
            try:
                return other, Path(hf_hub_download(name, f"{other}/config.json"))
            except EntryNotFoundError:
                continue
        raise missing


def _from_hub(name: str, dtype: torch.dtype | None, structure_only: bool) -> LoadedModel:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    with hub_access() as online:
        try:
            part, config = _denoiser_config(name)
            if structure_only:
                return LoadedModel(_from_config(config), name, name, False)
            model = _class_of(_read_config(config), name).from_pretrained(name, subfolder=part, **dtype_kwarg(dtype))
            return LoadedModel(model.eval(), name, name)
        except ModelNotFoundError:  # an OSError too, but it says what is wrong
            raise
        except HFValidationError as error:
            raise ModelNotFoundError(f"{name} is neither a local path nor a hub id: {first_line(error)}") from error
        except GatedRepoError as error:
            raise ModelNotFoundError(
                f"{name} is gated: accept its licence on its hub page and run `hf auth login`, or give the path of a local copy"
            ) from error
        except RepositoryNotFoundError as error:
            raise ModelNotFoundError(f"the hub has no {name}, or it is private: check the name, or run `hf auth login`") from error
        except LocalEntryNotFoundError as error:
            raise download_error(name, error, online=False) from error
        except EntryNotFoundError as error:
            raise ModelNotFoundError(f"{name} has no transformer/config.json: it is not a pipeline with a transformer") from error
        except OSError as error:
            raise download_error(name, error, online) from error

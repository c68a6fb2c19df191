"""Caches across the steps of a sampling that other libraries put on a model: they give out what an earlier call left there."""

from __future__ import annotations

from torch import nn


def step_cache_of(model: nn.Module) -> str | None:
    """Name what caches a model's blocks or attention across steps: a hook of diffusers' `enable_cache`, or cache-dit; None if nothing does.

    Their hooks are known by what they say of themselves: that they have a state.
    """
    if getattr(model, "_is_cached", False):
        return "cache-dit"
    for module in model.modules():
        hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
        found = next((hook for hook in hooks.values() if getattr(hook, "_is_stateful", False)), None)
        if found is not None:
            return type(found).__name__
    return None

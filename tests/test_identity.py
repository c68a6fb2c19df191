"""What an untrained conversion leaves exactly as it was, on real families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import edit_compile as ec
from edit_compile.student.site import converted_sites
from families import FAMILIES, TEXT, build

ONE_SITE = {
    "sd3": ("sd3", {"num_layers": 2}, "transformer_blocks.0.attn", ("*.1.*",)),
    "flux-double": ("flux", {"num_layers": 1, "num_single_layers": 1}, "transformer_blocks.0.attn", ("single_*",)),
    "flux-single": ("flux", {"num_layers": 1, "num_single_layers": 1}, "single_transformer_blocks.0.attn", ("transformer_blocks.*",)),
}


class Call:
    """What a module got and gave."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.args, self.kwargs, self.output = args, kwargs, output


@pytest.fixture(scope="module", params=ONE_SITE)
def one_site(request):
    """The calls of every site in a forward of the teacher and of a student with one site converted, and that site's path."""
    family, size, path, exclude = ONE_SITE[request.param]
    model, inputs = FAMILIES[family]()
    model = build(type(model), **{**model.config, **size})
    plan = ec.plan(model, ec.LinearizeConfig(text_keys="full", exclude=exclude), inputs)
    student = ec.linearize(model, plan=plan)
    assert list(converted_sites(student)) == [path]
    calls = [{site.path: Call(m.get_submodule(site.path)) for site in plan.sites} for m in (model, student)]
    with torch.no_grad():
        model(**inputs), student(**inputs)
    return path, *calls


def image_and_text(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of joint attention, which gives both, and of a single stream, where text comes first."""
    return output if isinstance(output, tuple) else (output[:, TEXT:], output[:, :TEXT])


def test_text_rows_are_the_teachers_and_image_rows_are_not(one_site):
    path, teacher, student = one_site
    (taught_image, taught), (image, text) = (image_and_text(calls[path].output) for calls in (teacher, student))
    torch.testing.assert_close(text, taught, atol=1e-5, rtol=0)
    assert (image - taught_image).abs().max() > 1e-3


def test_sites_that_are_kept_hold_the_same_weights_and_give_the_same_bits(one_site):
    path, teacher, student = one_site
    for other in teacher.keys() - {path}:
        taught, kept = teacher[other], student[other].module
        assert type(kept) is type(taught.module)
        weights, originals = dict(kept.named_parameters()), dict(taught.module.named_parameters())
        assert weights.keys() == originals.keys()
        assert all(torch.equal(weights[name], originals[name]) for name in weights)
        with torch.no_grad():
            again = kept(*taught.args, **taught.kwargs)
        assert all(map(torch.equal, image_and_text(again), image_and_text(taught.output)))

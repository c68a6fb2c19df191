"""A new attention design for image-only attention: cosine-weighted linear attention without any compression, in one class."""

from typing import Any

import torch
from torch import Tensor, nn

import edit_compile as ec
from edit_compile.adapters.load_model import load_model
from edit_compile.designs import Design, register
from edit_compile.designs.ops.linear_attention import linear_attention


class Cosine(nn.Module):
    """Linear attention on normalised, shifted queries and keys: 1 + cos(q, k) in place of exp(q . k)."""

    query = key = value = None  # nothing is added to the projections

    def forward(self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, mask: Tensor | None = None) -> Tensor:
        one = q_BHND.new_ones(1).expand(*q_BHND.shape[:-1], 1)
        q, k = (torch.cat([one, nn.functional.normalize(x, dim=-1)], -1) for x in (q_BHND, k_BHND))
        return linear_attention(q, k, v_BHND)[0]


def build(additions: Any, config: ec.LinearizeConfig) -> Cosine:
    return Cosine()


register(Design("cosine", joint=False, build=build))
config = ec.LinearizeConfig(design="cosine", query="plain", key="plain", value="plain")
student = ec.linearize(load_model("demo/mm-dit").model, config)
for site in ec.plan_of(student).sites:
    print(f"{site.path}: {site.action} ({site.reason})")

"""A design of your own, in one file: linear attention (arXiv 2006.16236) with cos(q, k) + shift in place of exp(q . k).

Once registered it is used by name, in Python, on the command line and in recipes:

    python examples/your_own_design.py
    edit-compile --import examples/your_own_design.py inspect demo/dit --design cosine --set shift=1.5
    edit-compile --import examples/your_own_design.py distill demo-dit --set "convert={design: cosine}"
"""

import math

import torch
from torch.nn.functional import normalize

import edit_compile as ec


@ec.register
class Cosine(ec.Design):
    """softmax(q . k) v becomes sum_j (cos(q, k_j) + shift) v_j / sum_j (cos(q, k_j) + shift)."""

    name = "cosine"

    class Options(ec.Design.Options):
        shift: float = 1.0  # from 1 on no weight is negative

    @classmethod
    def accepts(cls, site, options):
        if site.queries != site.keys or site.key_heads != site.heads:
            return ec.Verdict(False, "needs self-attention with as many key heads as query heads")
        if site.mask != "none" or site.causal:
            return ec.Verdict(False, "cannot apply a mask")
        return ec.Verdict(True, "linear attention by cosines")

    def __init__(self, site, options):
        super().__init__(site, options)
        self.shift = torch.nn.Parameter(torch.full((site.heads, 1, 1), options.shift))  # (H, 1, 1), trained

    def forward(self, x, tokens):
        q = torch.cat([normalize(x.query, dim=-1), self.shift * torch.ones_like(x.query[..., :1])], -1)
        k = torch.cat([normalize(x.key, dim=-1), torch.ones_like(x.key[..., :1])], -1)
        return q @ (k.mT @ x.value) / (q @ k.sum(-2, keepdim=True).mT).clamp(min=1e-6)

    @classmethod
    def flops(cls, site, grid, others, options):
        tokens, width = math.prod(grid) + others, site.head_dim + 1
        return 2 * tokens * site.heads * width * (2 * site.value_dim + 1)


if __name__ == "__main__":
    student = ec.linearize(ec.load_model("demo/dit").model, ec.LinearizeConfig(design="cosine", shift=1.5))
    print(ec.plan_of(student))
    for cost in ec.cost(student).costs:
        print(f"{cost.height} x {cost.width} px: {cost.ratio:.2f} times fewer FLOPs")

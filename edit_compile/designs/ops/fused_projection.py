"""A part of a projection that computes several things at once, such as queries, keys, values and a feed-forward network's input."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def project_part(projection: Any, x: Tensor, start: int, stop: int) -> Tensor:
    """Compute the output channels start to stop of a projection, (..., C) to (..., stop - start).

    What is more than a plain Linear, through LoRA, quantization or hooks, is called as a whole.
    """
    if type(projection) is not nn.Linear or projection._forward_hooks or projection._forward_pre_hooks:
        whole: Tensor = projection(x)
        return whole[..., start:stop]
    bias = projection.bias
    return F.linear(x, projection.weight[start:stop], None if bias is None else bias[start:stop])

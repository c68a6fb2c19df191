"""torch's own attention modules: converted in every layout, trained, and never past their forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edit_compile as ec
from small_picture import WIDTH, Picture, check_converted, image, reasons

pytestmark = pytest.mark.slow


class Multihead(nn.Module):
    """Pre-norm attention by nn.MultiheadAttention."""

    def __init__(self, *, batch_first=True, need_weights=False, **options):
        super().__init__()
        self.norm, self.need_weights, self.batch_first = nn.LayerNorm(WIDTH), need_weights, batch_first
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=batch_first, **options)

    def operands(self, y):
        return y, y, y

    def forward(self, x, **masks):
        y = self.norm(x if self.batch_first else x.transpose(0, 1))
        y, _ = self.attention(*self.operands(y), need_weights=self.need_weights, **masks)
        return x + (y if self.batch_first else y.transpose(0, 1))


class AveragedByHead(Multihead):
    """Returns the weights of every head; nobody reads them."""

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, average_attn_weights=False)[0]


class PositionsInQueriesAndKeys(Multihead):
    """As DETR: a third of the packed weight for each operand."""

    def operands(self, y):
        return y + 0.1, y + 0.1, y


class OwnWidths(Multihead):
    """Separate projections, of keys and values of other widths."""

    def __init__(self):
        super().__init__(kdim=24, vdim=16, bias=False)

    def operands(self, y):
        return y, y[..., :24], y[..., 16:]


class Padded(Multihead):
    """A padding mask that leaves no key out, as models make it without being told one."""

    def forward(self, x):
        return super().forward(x, key_padding_mask=torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device))


class ByFunction(nn.Module):
    """Calls the function behind the module."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 6), nn.Parameter(torch.zeros(3 * WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            y, y, y, WIDTH, 4, self.weight, self.bias, None, None, False, 0.0, self.out.weight, self.out.bias, training=False
        )
        return x + y.transpose(0, 1)


def encoder_layer(**options):
    return lambda: nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, **options)


MODELS = {
    "tokens first, with weights": (lambda: Multihead(batch_first=False, need_weights=True), Padded),
    "by head, own widths": (AveragedByHead, OwnWidths),
    "positions, by function": (PositionsInQueriesAndKeys, ByFunction),
    "encoder layers": (encoder_layer(), encoder_layer(norm_first=True, activation="gelu", bias=False)),
}


@pytest.mark.parametrize("name", MODELS)
def test_torchs_attention_is_converted(name):
    blocks = iter(MODELS[name])
    model = Picture(lambda: next(blocks)())
    student = check_converted(model, "edit")
    assert set(model.state_dict()) <= set(student.state_dict())
    student.train()
    student(**image(2, 6, 10)).square().mean().backward()
    for path, parameter in student.named_parameters():
        if "in_proj_weight" in path or "q_proj_weight" in path:
            assert parameter.grad is not None, path
            assert parameter.grad.abs().max() > 0, path


class Encoder(Picture):
    def __init__(self):
        super().__init__(lambda: nn.Identity())
        self.encoder = nn.TransformerEncoder(encoder_layer()(), 2, enable_nested_tensor=True)

    def run(self, y):
        return self.encoder(y)


def test_an_encoder_runs_its_converted_layers_in_evaluation_too():
    """In evaluation without gradients, torch's encoder layer computes attention past its module, from the weights alone."""
    check_converted(Encoder(), "edit", ("encoder.layers.0", "encoder.layers.1"))


class ReadsWeights(Multihead):
    def forward(self, x):
        y = self.norm(x)
        y, weights = self.attention(y, y, y)
        return x + y * weights.amax(-1, keepdim=True)


def test_attention_whose_weights_are_read_is_kept_for_it():
    assert all("used for more than the sum of the values" in reason for reason in reasons(Picture(ReadsWeights)).values())


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_a_key_that_belongs_to_no_token_is_one_beside_the_image(option):
    check_converted(Picture(lambda: Multihead(**{option: True})), "mm-edit")


def test_a_decoder_layer_attends_to_its_memory_unchanged():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
            self.memory = nn.Parameter(torch.randn(1, 5, WIDTH))

        def forward(self, x):
            return self.layer(x, self.memory.expand(x.shape[0], -1, -1))

    plan = ec.plan(Picture(Decoder).eval(), example_inputs=image(2, 6, 10))
    assert {site.path: site.action for site in plan.sites if site.path.startswith("blocks.0")} == {
        "blocks.0.layer.self_attn": "edit",
        "blocks.0.layer.multihead_attn": "keep",
    }

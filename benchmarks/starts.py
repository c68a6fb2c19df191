"""How near an untrained student is to its teacher, by design and start: `python benchmarks/starts.py [--models NAME ...] [--samples 128]`.

The relative error sum |student - teacher|^2 / sum |teacher - mean|^2 of the trained demo models' outputs on held-out scenes with their
captions, timesteps spread evenly; nothing is trained. Random starts are medians of three. Prints a Markdown table for each model.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor, nn

import edit_compile as ec
from edit_compile.adapters.load_model import load_model
from edit_compile.demo import models, prompt_adherence

BATCH, SEEDS = 32, (0, 1, 2)
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("edit", {}),
    ("edit", {"key": "plain", "value": "plain"}),
    ("edit", {"identity": False}),
    ("mm-edit", {}),
    ("mm-edit", {"eta": "ratio"}),
    ("mm-edit", {"identity": False}),
    ("linear-mm-alpha", {}),
    ("linear-mm-alpha", {"balance": False}),
    ("linear-mm-alpha", {"identity": False}),
    ("linfusion", {}),
    ("linfusion", {"identity": False}),
    ("sana", {"mix_ffn": False}),
    ("sana", {}),
    ("mix-ffn", {}),
    ("mix-ffn", {"identity": False}),
    ("kv-compress", {}),
    ("kv-compress", {"balance": False}),
    ("kv-compress", {"layer_norm": True}),
    ("kv-compress", {"layer_norm": True, "balance": False}),
    ("kv-compress", {"factor": 4}),
    ("kv-compress", {"factor": 4, "balance": False}),
    ("clear", {}),
    ("clear", {"radius": 4}),
    ("local-linear", {}),
)


def held_out(model: nn.Module, count: int) -> tuple[Tensor, list[str]]:
    """Render the first held-out images (count, 3, H, W) or clips in [-1, 1] of what a model was trained on, and their captions."""
    found = prompt_adherence.held_out(models.trained_on(model), count)
    return found.true_samples() * 2 - 1, list(found.captions)


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor, captions: list[str]) -> Tensor:
    """Predict the velocity at noisy images, of seed 0, with timesteps spread evenly over the samples."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    sigma = (torch.arange(len(images)) + 0.5) / len(images)
    at = sigma.view(-1, *[1] * (images.ndim - 1))
    noisy = (1 - at) * images + at * noise
    parts = [slice(start, start + BATCH) for start in range(0, len(images), BATCH)]
    return torch.cat([models.predict(model, noisy[part], sigma[part], models.conditions(model, captions[part])) for part in parts])


def error(model: nn.Module, design: str, options: dict[str, Any], data: tuple[Tensor, list[str]], teacher: Tensor, seed: int) -> float:
    torch.manual_seed(seed)
    config = ec.LinearizeConfig(design=design, **options)
    found = predictions(ec.linearize(model, config), *data)
    return ((found - teacher).square().sum() / (teacher - teacher.mean()).square().sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=models.NAMES, default=models.NAMES)
    parser.add_argument("--designs", nargs="*", default=sorted({design for design, _ in ROWS}))
    parser.add_argument("--samples", type=int, default=128)
    args = parser.parse_args()
    for name in args.models:
        model = load_model(f"demo/{name}").model
        data = held_out(model, args.samples)
        teacher = predictions(model, *data)
        print(f"\n| demo/{name}: design | options | error |\n|---|---|---|")
        for design, options in (row for row in ROWS if row[0] in args.designs):
            seeds = SEEDS if options.get("identity") is False else SEEDS[:1]
            try:
                found = statistics.median(error(model, design, options, data, teacher, seed) for seed in seeds)
            except ec.PlanError:  # the design takes no site of this model
                continue
            print(f"| {design} | {', '.join(f'{key}={value}' for key, value in options.items())} | {found:.4f} |", flush=True)


if __name__ == "__main__":
    main()

"""Train the classifier whose features the demos' Frechet distance uses: `python scripts/train_demo_features.py`.

On images of groups of textured shapes, with a little noise, it learns to tell of every quadrant the colour, shape, texture, size
and number of the objects, and the background. The run is seeded; `config.json` and `model.safetensors` are written at its end,
each at once. At last it prints how many held-out quadrants are told right, and the distance of damaged images to true ones.
Three minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from edit_compile.demo import features, groups, shapes
from edit_compile.files import replacing, write_text

CONFIG = {"channels": [24, 48, 64, 64, 64], "width": 32}
NOISE = 0.03
HELD_OUT = 20_000  # a seed that no step has


def labelled(scenes: list[groups.Scene]) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw scenes: images (B, 3, 64, 64), and for every head classes (B, 4), -100 where there is nothing to tell; (B,) of backgrounds."""
    images = torch.from_numpy(np.stack([groups.render(scene) for scene in scenes])).movedim(-1, 1)
    told = {name: torch.full((len(scenes), 4), -100) for name in features.HEADS}
    told["count"][:] = 0
    for row, scene in enumerate(scenes):
        for group in scene.groups:
            quadrant = 2 * (group.place[0] == "lower") + (group.place[1] == "right")
            for name in ("colour", "shape", "texture", "size"):
                told[name][row, quadrant] = features.HEADS[name].index(getattr(group, name))
            told["count"][row, quadrant] = len(group.centres)
    told["background"] = torch.tensor([features.BACKGROUNDS.index(scene.background) for scene in scenes])
    return images, told


def loss_of(model: features.GroupClassifier, images: Tensor, told: dict[str, Tensor]) -> Tensor:
    """Sum the cross-entropies of all heads."""
    logits = model(images)
    return torch.stack([F.cross_entropy(logits[name].flatten(0, -2), classes.flatten()) for name, classes in told.items()]).sum()


@torch.no_grad()
def shares_right(model: features.GroupClassifier, images: Tensor, told: dict[str, Tensor]) -> dict[str, float]:
    """Measure for every head the share of what there is to tell that is told right."""
    found = {}
    for name, logits in model(images).items():
        there = told[name] >= 0
        found[name] = round((logits.argmax(-1) == told[name])[there].double().mean().item(), 4)
    return found


def blurred(images: Tensor) -> Tensor:
    """Average every pixel with its eight neighbours, twice."""
    for _ in range(2):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return images


def shuffled(images: Tensor) -> Tensor:
    """Put the three channels of every pixel into an order of its own."""
    order = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    return images.gather(1, order)


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {  # from slight to heavy
    "none": lambda images: images,
    "blurred": blurred,
    "colours shuffled": shuffled,
    "noise": lambda images: torch.rand(images.shape, generator=torch.Generator().manual_seed(0)),
}


def damage_table(draw: Callable[[int], Tensor]) -> dict[str, float]:
    """Measure the distance of damaged images to true ones of the same captions; `draw` makes them with the objects put by a seed."""
    true, others = features.features(draw(0)), draw(1)
    return {name: features.frechet_distance(true, features.features(damage(others))) for name, damage in DAMAGES.items()}


def of_groups(seed: int, count: int = 500) -> Tensor:
    """Draw the images of 64 px of held-out captions, with the objects where their captions let them be."""
    rng = random.Random(seed)
    cell, scenes = groups.IMAGE_SIZE // 4, itertools.islice(groups.scenes(HELD_OUT), count)

    def elsewhere(group: groups.Group) -> groups.Group:
        top, left = (2 * cell * (side in ("lower", "right")) for side in group.place)
        cells = rng.sample(range(4), len(group.centres))
        middles = [(top + (n // 2 + 0.5) * cell, left + (n % 2 + 0.5) * cell) for n in cells]
        off = groups.JITTER
        return replace(group, centres=tuple((row + rng.uniform(-off, off), column + rng.uniform(-off, off)) for row, column in middles))

    return labelled([replace(scene, groups=tuple(map(elsewhere, scene.groups))) for scene in scenes])[0]


def of_shapes(seed: int, count: int = 500) -> Tensor:
    """Draw the images of 32 px of held-out captions, with the objects where their captions let them be."""
    rng, drawn = random.Random(seed), []
    for scene in itertools.islice(shapes.scenes(HELD_OUT), count):
        items = (replace(item, offset=(rng.uniform(-1, 1), rng.uniform(-1, 1))) for item in scene.items)
        drawn.append(shapes.render(replace(scene, items=tuple(items))))
    return torch.from_numpy(np.stack(drawn)).movedim(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=features.FOLDER)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = features.from_config(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-3)
    clock, recent = time.monotonic(), []
    for step in range(args.steps):
        rng = random.Random(args.seed * 1_000_003 + step)
        images, told = labelled([groups.random_scene(rng) for _ in range(args.batch)])
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(step)) * rng.uniform(0, NOISE)
        for options in optimizer.param_groups:
            options["lr"] = args.lr * min(1, (step + 1) / 100, 2 * (1 - step / args.steps))
        loss = loss_of(model, images + noise, told)
        model.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            print(json.dumps({"step": step + 1, "loss": sum(recent) / len(recent), "seconds": round(time.monotonic() - clock)}), flush=True)
            recent = []
    args.out.mkdir(parents=True, exist_ok=True)
    with replacing(args.out / features.WEIGHTS.name) as temporary:
        save_file(model.state_dict(), temporary)
    (args.out / features.WEIGHTS.name).chmod(0o644)  # safetensors lets nobody else read its files
    write_text(args.out / "config.json", json.dumps(CONFIG) + "\n")
    held_out = labelled(list(itertools.islice(groups.scenes(HELD_OUT), 500)))
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), **shares_right(model.eval(), *held_out)}))
    if args.out.resolve() == features.FOLDER.resolve():
        print(json.dumps({"64 px": damage_table(of_groups), "32 px": damage_table(of_shapes)}, indent=2))


if __name__ == "__main__":
    main()

"""Train a demo model from scratch: `python scripts/train_demo.py mm-dit --out runs/mm-dit`.

Rectified flow on procedural images or clips, in stages of growing resolution, with Muon for the blocks' matrices and AdamW for
the rest, at a constant rate that falls to zero in the last third of the steps, and an EMA of the weights. The run is seeded.
Every `--save-every` steps its state is saved to `OUT/state.safetensors` (atomically), from which a rerun of the same command
continues. The EMA weights are written to `OUT/model` in diffusers' folder format. One CPU core does about 2 steps a second of
the 32 px models, 4 of video-dit; a 64 px model takes it some hours.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edit_compile.demo import groups, models, motion, shapes
from edit_compile.demo.prompt_adherence import group_adherence, motion_adherence, prompt_adherence

COOL_DOWN = 1 / 3


class Stage(NamedTuple):
    """Steps of a batch size on samples of a side in pixels. A positive shift trains more at high noise: more pixels, or equal
    frames, show through more of it."""

    side: int
    steps: int
    batch: int
    shift: float = 0.0


STAGES = {
    "mm-dit": (Stage(32, 4_500, 16),),
    "dit": (Stage(32, 3_500, 16),),
    "mm-dit-64": (Stage(32, 2_000, 16), Stage(64, 3_000, 8, 0.5)),
    "dit-64": (Stage(32, 2_000, 16), Stage(64, 3_000, 8, 0.5)),
    "video-dit": (Stage(24, 3_600, 8, 0.5),),
}


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage that a step, counted from 0 over all stages, belongs to."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError("the stages have fewer steps")


def batch(name: str, stages: Sequence[Stage], seed: int, step: int) -> tuple[Tensor, list[str]]:
    """Make a step's images (B, 3, H, W), or clips (B, 3, 8, 24, 24), in [-1, 1], and captions, a tenth of them empty.

    All is a function of the arguments alone.
    """
    rng, stage = random.Random(seed * 1_000_003 + step), stage_at(stages, step)
    pairs = [_sample(name, stage.side, rng) for _ in range(stage.batch)]
    pixels = torch.from_numpy(np.stack([drawn for drawn, _ in pairs])).movedim(-1, 1) * 2 - 1
    return pixels, ["" if rng.random() < 0.1 else caption for _, caption in pairs]


def _sample(name: str, side: int, rng: random.Random) -> tuple[np.ndarray, str]:
    if name == models.VIDEO_NAME:
        clip = motion.random_clip(rng)
        return motion.render(clip), motion.caption(clip)
    if name in models.LARGE_NAMES:
        scene = groups.random_scene(rng)
        return groups.render(scene, side), groups.caption(scene)
    simple = shapes.random_scene(rng)
    return shapes.render(simple), shapes.caption(simple)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan et al. 2024) for matrices of hidden weights, in float32.

    `torch.optim.Muon` iterates in bfloat16, which processors without bfloat16 instructions emulate slowly. Here, equal
    shapes are also batched.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                scale = group["lr"] * 0.2 * max(shape) ** 0.5  # the size of an AdamW update
                for parameter, update in zip(parameters, orthogonalised(updates), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        slot = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        slot.lerp_(parameter.grad, 1 - momentum)
        return torch.lerp(parameter.grad, slot, momentum)


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Approximate the nearest semi-orthogonal matrices to (n, rows, columns) with Newton-Schulz iterations."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x: Tensor = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if wide is matrices else x.mT


def optimizers_for(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Make a Muon for the blocks' matrices and an AdamW for everything else."""
    hidden = [p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(hidden, rate), torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.99))]


def save_state(path: Path, step: int, model: nn.Module, ema: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    """Write all that a later run needs to continue, atomically."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"ema.{k}": v for k, v in ema.items()}
    for number, optimizer in enumerate(optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{number}.{index}.{k}": v for k, v in slots.items()}
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in state.items()}, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def load_state(path: Path, model: nn.Module, ema: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> int:
    """Restore what `save_state` wrote; returns the step to continue with."""
    from safetensors import safe_open

    state = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    for name in ema:
        ema[name].copy_(state[f"ema.{name}"])
    slots: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, number, index, slot = key.split(".")
            slots[int(number)].setdefault(int(index), {})[slot] = value
    for optimizer, found in zip(optimizers, slots, strict=True):
        optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def adherence_of(name: str) -> Any:
    """Return the function that measures how well a model's samples obey their captions."""
    if name == models.VIDEO_NAME:
        return motion_adherence
    return group_adherence if name in models.LARGE_NAMES else prompt_adherence


def drawn_ahead(draw: Callable[[int], tuple[Tensor, list[str]]], steps: range, workers: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Draw the batches of steps in order, some steps ahead in so many processes; with none, as they are asked for."""
    if not workers:
        yield from map(draw, steps)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    try:
        waiting: deque[Future[tuple[np.ndarray, list[str]]]] = deque()
        for step in steps:
            waiting.append(pool.submit(_as_array, draw, step))
            if len(waiting) > 2 * workers:
                yield _as_tensor(*waiting.popleft().result())
        while waiting:
            yield _as_tensor(*waiting.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)


def _as_array(draw: Callable[[int], tuple[Tensor, list[str]]], step: int) -> tuple[np.ndarray, list[str]]:
    """Draw a batch in another process: tensors would come from there through shared memory, of which there may be little."""
    pixels, captions = draw(step)
    return pixels.numpy(), captions


def _as_tensor(pixels: np.ndarray, captions: list[str]) -> tuple[Tensor, list[str]]:
    return torch.from_numpy(pixels), captions


def train(
    model: Any,
    stages: Sequence[Stage],
    draw: Callable[[int], tuple[Tensor, list[str]]],
    folder: Path,
    *,
    rate: float = 2e-3,
    seed: int = 0,
    save_every: int = 250,
    device: str = "cpu",
    workers: int = 0,
    compiled: bool = True,
    until: float = float("inf"),
    saved: Callable[[int, Any], None] = lambda step, averaged: None,
) -> int:
    """Train a demo model in stages, or go on with what is in the folder: its state in `state.safetensors`, the average in `model`.

    Args:
        draw: the images and captions of a step.
        device: on a GPU forwards are in bfloat16.
        workers: processes that draw.
        until: when to save and stop, on the monotonic clock.
        saved: called with the number of steps done and the averaged model after it was saved.

    Returns:
        The number of steps done, of all stages.
    """
    steps, half = sum(stage.steps for stage in stages), torch.device(device).type == "cuda"
    model.to(device)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizers = optimizers_for(model, rate)
    state_file = folder / "state.safetensors"
    start = load_state(state_file, model, ema, optimizers) if state_file.exists() else 0
    step_model = torch.compile(model, dynamic=False) if compiled else model

    recent, clock, done = list[Tensor](), time.monotonic(), start
    for step, (images, captions) in zip(range(start, steps), drawn_ahead(draw, range(start, steps), workers), strict=True):
        now = min(1, step / 200, (1 - step / steps) / COOL_DOWN) * rate
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = now
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        noise = torch.randn(images.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(len(images), generator=generator) + stage_at(stages, step).shift)
        condition = models.conditions(model, captions)
        images, noise, sigma, condition = pytree.tree_map(
            lambda x: x.to(device) if isinstance(x, Tensor) else x, (images, noise, sigma, condition)
        )
        x = torch.lerp(images, noise, sigma.view(-1, *[1] * (images.ndim - 1)))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            velocity = models.predict(step_model, x, sigma, condition)
        loss = (velocity.float() - (noise - images)).square().mean()
        model.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                ema[name].lerp_(value, 1 - decay) if value.is_floating_point() else ema[name].copy_(value)
        recent.append(loss.detach())
        done = step + 1
        if done % 100 == 0:
            row = {"step": done, "loss": torch.stack(recent).mean().item(), "seconds": round(time.monotonic() - clock, 1)}
            print(json.dumps(row), flush=True)
            recent = []
        over = time.monotonic() > until
        if done % save_every == 0 or done == steps or over:
            save_state(state_file, done, model, ema, optimizers)
            averaged = type(model).from_config(dict(model.config))
            averaged.load_state_dict(ema)
            averaged.eval().save_pretrained(folder / "model")
            saved(done, averaged)
        if over:
            break
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=models.NAMES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    stages = STAGES[args.name]
    steps = sum(stage.steps for stage in stages)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    def measure(step: int, averaged: Any) -> None:
        if (step % (4 * args.save_every) == 0 and stage_at(stages, step - 1) is stages[-1]) or step == steps:
            found = adherence_of(args.name)(averaged, 20 if step < steps else 200)
            print(json.dumps({"step": step, **found.to_dict()}), flush=True)

    draw = partial(batch, args.name, stages, args.seed)
    options = {"rate": args.lr, "seed": args.seed, "save_every": args.save_every}
    train(models.untrained(args.name), stages, draw, args.out, **options, saved=measure)


if __name__ == "__main__":
    main()

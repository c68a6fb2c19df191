"""Checkpoints, recipes and plans in which bytes or values were changed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import edit_compile as ec
from attacks.processes import forked, judged, watched
from attacks.workshop import checkpoint, inputs_of, original, plan, workshop
from edit_compile.distillation import load_recipe
from edit_compile.student.checkpoint_format import INDEX

LIMIT, MEMORY = 60.0, 6 * 2**30  # seconds and bytes of address space for reading one damaged file
NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 1e400, float("nan"), "", "x" * 100_000, [], {}, [[]], "s0" * 60, "9**9**9**9", "1//0", "\ud800"),
    *("../../../../etc/passwd", "/dev/zero", "https://example.com/x", "__import__('os').system('true')", {"a": {"a": {"a": [1]}}}),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List where in nested data a value can be changed."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _places(each, (*path, key))


def changed(value: Any, rng: random.Random) -> Any:
    """Change one place of nested data: another value, one less, or one more."""
    value = json.loads(json.dumps(value))
    *above, key = rng.choice(list(_places(value)))
    inside = value
    for step in above:
        inside = inside[step]
    how = rng.randrange(4)
    if how == 0:
        del inside[key]
    elif how == 1 and isinstance(inside, list):
        inside.append(inside[key])
    elif how == 2 and isinstance(inside, dict):
        inside[f"{key}x"] = rng.choice(NASTY)
    else:
        inside[key] = rng.choice(NASTY)
    return value


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut some bytes off, overwrite some, or insert some."""
    at, how = rng.randrange(len(content)), rng.randrange(3)
    some = rng.randbytes(rng.choice([1, 1, 8, 200]))
    return content[:at] if how == 0 else content[:at] + some + content[at + (len(some) if how == 1 else 0) :]


def checkpoints(number: int, folder: Path) -> str:
    rng = random.Random(number)
    shutil.copytree(checkpoint(), folder)
    index = json.loads((folder / INDEX).read_text())
    if rng.random() < 0.7:
        (folder / INDEX).write_text(json.dumps(changed(index, rng)))
        what = "a value of the JSON"
    else:
        file = folder / rng.choice([INDEX, index["tensors"]])
        file.write_bytes(changed_bytes(file.read_bytes(), rng))
        if file.name != INDEX and rng.random() < 0.5:  # by someone who knows the format
            index["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
            (folder / INDEX).write_text(json.dumps(index))
        what = f"bytes of {'the JSON' if file.name == INDEX else 'the tensors'}"
    model = original()

    def loaded() -> None:
        student = ec.load(folder, model)
        with torch.no_grad():
            student(**inputs_of(64, 96))

    return judged(forked(watched(loaded), limit=LIMIT, memory=MEMORY), f"checkpoint {number}, {what}")


def recipes(number: int, folder: Path) -> str:
    rng = random.Random(number)
    folder.mkdir()
    content = yaml.safe_load((workshop() / "run.yaml").read_text())
    text = yaml.safe_dump(json.loads(json.dumps(changed(content, rng)).replace("\\ud800", "?")), allow_unicode=True).encode()
    how = rng.randrange(6)
    if how == 0:
        text = changed_bytes(text, rng)
    elif how == 1:
        text += (
            b"\na: &a ["
            + b"x, " * 9
            + b"]\n"
            + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9))
        )
    elif how == 2:
        text += rng.choice(
            [b"\nx: !!python/object/apply:os.system ['true']\n", b"\nx: &x [*x]\n", b"\nx: " + b"[" * 2000, b"\nx: 2026-99-99\n", b"\x00"]
        )
    (folder / "recipe.yaml").write_bytes(text)
    return judged(forked(watched(lambda: load_recipe(folder / "recipe.yaml")), limit=10, memory=MEMORY), f"recipe {number}")


def plans(number: int, folder: Path) -> str:
    rng = random.Random(number)
    if rng.random() < 0.7:
        text, what = json.dumps(changed(json.loads(plan().to_json()), rng)), "a value"
    else:
        text, what = changed_bytes(plan().to_json().encode(), rng).decode(errors="surrogateescape"), "bytes"
    model = original()

    def taken() -> None:
        found = ec.Plan.from_json(text)
        str(found)
        student = ec.linearize(model, plan=found)
        with torch.no_grad():
            student(**inputs_of(64, 96))

    return judged(forked(watched(taken), limit=LIMIT, memory=MEMORY), f"plan {number}, {what}")

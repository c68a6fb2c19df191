"""What is timed against each other: a model, its conversions, and the model with its attention between image tokens taken out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from edit_compile.adapters.inputs import ImageInputs
from edit_compile.api import block_options, plan_with_forwards, repeated_blocks
from edit_compile.bench.flops import count_flops
from edit_compile.bench.kernels import measure_kernels
from edit_compile.bench.memory import peak_memory
from edit_compile.bench.site_parts import layouts_noted, parts_by_site
from edit_compile.config import LinearizeConfig
from edit_compile.designs import NO_ATTENTION
from edit_compile.designs.ops.kernels.choice import choose_kernels
from edit_compile.designs.ops.parts import Part
from edit_compile.errors import PlanError
from edit_compile.passes.capture import meta_copy, meta_inputs
from edit_compile.passes.native_attention import native_attention
from edit_compile.student.convert import install
from edit_compile.student.grid import grid
from edit_compile.student.site import converted_sites

TEACHER, BOUND = "teacher", "bound"
_GRAPHS = 256  # of one kind of block: each subject has its own


@dataclass(frozen=True)
class Subject:
    """A model that is timed.

    Attributes:
        name: "teacher", "bound", or what the user calls a conversion.
        structure: the same on the meta device, of the same types.
        rewritten: the paths of its converted sites.
    """

    name: str
    model: nn.Module
    structure: nn.Module
    rewritten: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """What one forward takes, counted without running it.

    Attributes:
        flops: of the model.
        memory: bytes of the tensors that are made, at the moment when most are alive.
        sites: what the designs add, by site.
    """

    flops: int
    memory: int
    sites: Mapping[str, tuple[Part, ...]]

    @property
    def parts(self) -> Counter[Part]:
        """What the designs add, with how often they do."""
        return Counter(part for parts in self.sites.values() for part in parts)


def make_subjects(model: nn.Module, conversions: Mapping[str, LinearizeConfig], *, compiled: bool = False) -> list[Subject]:
    """Make all that is compared with a model: the conversions by name, and the model without attention between image tokens.

    Args:
        compiled: compile the repeated blocks of all of them, those of the model itself, too.

    Raises:
        PlanError: a conversion converts nothing; says why the first site was left unchanged.
    """
    plans = {
        name: plan_with_forwards(model, config) for name, config in {**conversions, BOUND: LinearizeConfig(design=NO_ATTENTION)}.items()
    }
    for name, found in plans.items():
        if not found.plan.rewritten:
            raise PlanError(f"{name} converts no site of {found.plan.model}: {found.plan.sites[0].path}: {found.plan.sites[0].reason}")
    subjects = [Subject(TEACHER, model, meta_copy(model, None), ())]
    for name, found in plans.items():
        student = install(model, found)
        subjects.append(Subject(name, student, meta_copy(student, None), tuple(converted_sites(student))))
    if compiled:
        for subject in subjects[1:]:
            measure_kernels(subject.model)
            choose_kernels(subject.model, "auto")
        blocks = repeated_blocks(subjects[-1].model)
        for path in blocks:
            for subject in subjects:
                subject.model.get_submodule(path).compile(**block_options(graphs=_GRAPHS))
    return subjects


def count_work(subject: Subject, image: ImageInputs) -> Work:
    """Count what a forward with these inputs takes."""
    structure = subject.structure
    inputs = meta_inputs(image.inputs, next(p.dtype for p in structure.parameters() if p.is_floating_point()))
    stated = grid(structure, *image.grid) if subject.rewritten else nullcontext()
    with stated, layouts_noted(structure) as layouts:
        flops = count_flops(structure, inputs).total
        with torch.no_grad(), native_attention(structure):
            memory = peak_memory(lambda: structure(**inputs))
    return Work(flops, memory, parts_by_site(structure, layouts, image.grid, image.text))

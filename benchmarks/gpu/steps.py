"""The steps, in their order: what is worth most first."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu import compiled, demo, kernels, latency, marked_tests, training
from benchmarks.gpu.step import Step

STEPS = (
    Step("tests", "Tests that need a GPU", 9, marked_tests.units),
    *(
        Step(f"latency-{name}", f"Seconds of a forward: {latency.MODELS[name].source}, compiled, in turns", 9, partial(latency.units, name))
        for name in latency.MODELS
    ),
    Step("kernels", "Kernels against what Inductor makes of the same formulas", 9, kernels.units),
    Step("compile", "Graphs, seconds to the first image, CUDA graphs and an exported package", 9, compiled.units),
    *(Step(f"training-{name}", f"A training step: {name}, random weights", 9, partial(training.units, name)) for name in training.CASES),
    Step("demo-teacher", "A teacher of 30 million parameters for images of 128 px, trained in stages", 9, demo.teacher_units),
    Step("demo-student", "It converted and distilled", 9, demo.student_units),
    Step("demo-gallery", "What teacher and student draw", 9, demo.gallery_units),
)

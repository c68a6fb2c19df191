"""Measuring a conversion: FLOPs, latency, memory."""

from edit_compile.bench.conversion_cost import Cost, CostReport, SiteCost, cost, size_in_words, video_size
from edit_compile.bench.flops import FlopCount, count_flops
from edit_compile.bench.latency import SpeedRow, Timing, compare_calls, compare_speed, matmul_flops_per_second
from edit_compile.bench.memory import peak_memory

__all__ = [
    "Cost",
    "CostReport",
    "FlopCount",
    "SiteCost",
    "SpeedRow",
    "Timing",
    "compare_calls",
    "compare_speed",
    "cost",
    "count_flops",
    "matmul_flops_per_second",
    "peak_memory",
    "size_in_words",
    "video_size",
]

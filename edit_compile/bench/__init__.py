"""Measuring a conversion: FLOPs, latency, memory."""

from edit_compile.bench.cost import Cost, CostReport, FlopCount, SiteCost, conversion_cost, count_flops
from edit_compile.bench.latency import Row, Timing, compare_calls, compare_speed, matrix_product_speed
from edit_compile.bench.memory import peak_memory

__all__ = [
    "Cost",
    "CostReport",
    "FlopCount",
    "Row",
    "SiteCost",
    "Timing",
    "compare_calls",
    "compare_speed",
    "conversion_cost",
    "count_flops",
    "matrix_product_speed",
    "peak_memory",
]

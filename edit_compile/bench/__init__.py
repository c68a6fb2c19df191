"""Measuring a conversion: FLOPs, latency, memory."""

from edit_compile.bench.cost import Cost, CostReport, FlopCount, SiteCost, conversion_cost, count_flops

__all__ = ["Cost", "CostReport", "FlopCount", "SiteCost", "conversion_cost", "count_flops"]

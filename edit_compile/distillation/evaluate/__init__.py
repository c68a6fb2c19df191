"""Held-out errors, sample grids, speed."""

"""Validation, sample grids, speed."""

"""Axes: what every dimension of a tensor is made of, and how operations change it."""

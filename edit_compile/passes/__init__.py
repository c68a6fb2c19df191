"""The passes: plain functions over one graph. `analyse` runs them in order over a whole model."""

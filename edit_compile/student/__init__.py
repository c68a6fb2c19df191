"""The converted model, at run time and on disk."""

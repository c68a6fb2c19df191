"""Model families: the only package that knows any by name."""

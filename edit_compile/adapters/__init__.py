"""Model families: the only package that knows model classes by name."""

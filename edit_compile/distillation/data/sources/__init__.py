"""Kinds of data, one file each."""

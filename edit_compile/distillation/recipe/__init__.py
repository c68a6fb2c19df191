"""Recipes: their schema, their files, their schedule."""

"""Recipes: schema, reading, error messages and placement arithmetic. Nothing here imports torch."""

"""Recipes: a TOML file each, and a task where the samples need more than being read."""

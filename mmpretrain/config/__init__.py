"""Recipes: their options, their checks and their documentation."""

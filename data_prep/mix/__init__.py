"""The command `mix`: what a recipe's data mixture amounts to."""

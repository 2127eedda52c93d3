"""Reproduce an encoder: the MiCL method, its recipes, and the loop that trains them."""

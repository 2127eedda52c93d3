"""Reproduce an encoder: the MiCL method, its recipes, and the loop that trains them (installed as micl_zoo.training)."""

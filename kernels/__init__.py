"""Kernels: the plain oracle of every op (`reference`), and their fast forms."""

"""Kernels, one op a file: words and maths, reference, kernel, launch, public name; README.md: how they use a GPU."""

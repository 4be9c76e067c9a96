"""Loops over tensors in a CPU's memory, compiled by Numba at first use and kept on disk."""

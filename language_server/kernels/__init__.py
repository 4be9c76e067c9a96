"""What a CPU computes between matrix products: attention over the paged cache, norms, rotation, gating.

Each function is one pass over memory where torch would launch several operations of some microseconds each, as many as
the arithmetic of a small batch takes.
"""

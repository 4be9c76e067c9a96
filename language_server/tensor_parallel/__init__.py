"""One language model over several devices: every rank holds a share of each layer, rank 0 is the server itself.

Rank 0 schedules, samples and talks to the world; for each step it tells the others what to compute (channel.py), and
they sum up what their shares contribute (collectives.py). Who holds what is transformers' tensor-parallel plan
(plan.py).
"""

"""Dr. GRPO (2503.20783): no division by the group's spread nor by the responses' lengths.

Token losses are summed and divided by a constant, the number of responses times the longest
response allowed.
"""

from functools import partial

from cppo.methods.grpo import GRPO

DR_GRPO = partial(GRPO, normalize=False, aggregation="sequence-sum-norm")

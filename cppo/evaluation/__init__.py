"""Evaluation: metrics with confidence intervals, and the runs that produce them."""

from cppo.evaluation.metrics import (
    Estimate,
    avg_at_k,
    maj_at_k,
    paired_difference,
    pass_at_k,
    summarise,
)

__all__ = [
    "Estimate",
    "avg_at_k",
    "maj_at_k",
    "paired_difference",
    "pass_at_k",
    "summarise",
]

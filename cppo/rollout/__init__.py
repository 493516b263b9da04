"""Rollouts: sampled responses to prompts."""

from cppo.rollout.transformers import Response, Sampling, generate

__all__ = ["Response", "Sampling", "generate"]

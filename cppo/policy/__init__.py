"""The policy: a vision-language model, its prompts, and how it scores responses."""

from cppo.policy.batch import Row
from cppo.policy.loading import Policy, load, save
from cppo.policy.packed import packed_tokens
from cppo.policy.prompts import Prompt, encode_item, encode_view
from cppo.policy.scoring import Scorer

__all__ = [
    "Policy",
    "Prompt",
    "Row",
    "Scorer",
    "encode_item",
    "encode_view",
    "load",
    "packed_tokens",
    "save",
]

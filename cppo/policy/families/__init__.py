"""Model families: what differs between vision-language architectures, one file each."""

from __future__ import annotations

from cppo.policy.families.family import Family
from cppo.policy.families.gemma3 import Gemma3
from cppo.policy.families.idefics3 import Idefics3
from cppo.policy.families.internvl import InternVL
from cppo.policy.families.llava_onevision import LlavaOnevision
from cppo.policy.families.qwen_vl import QwenVL

FAMILIES: dict[str, type[Family]] = {
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": QwenVL,
    "internvl": InternVL,
    "llava_onevision": LlavaOnevision,
    "idefics3": Idefics3,
    "smolvlm": Idefics3,
    "gemma3": Gemma3,
}


def family_of(model_type: str) -> type[Family]:
    """The family of a transformers `model_type`; ValueError for one that is not supported."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"models of type {model_type!r} are not supported; known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "family_of"]

"""Attention: which of transformers' works here, and how a group of responses is attended to.

kernels.py  one call of attention as transformers dispatches it, and its trial on this machine
groups.py   the group layout, and the function that stands for a model's attention
merged.py   attention within it in parts, merged by their log-sum-exp
masked.py   attention within it under a mask, which any kernel can do
choice.py   which of the two a device has: a trial, and where need be the time of both
pieces.py   pieces of unequal length, end to end and as padded rows
"""

from cppo.attention.kernels import (
    Kernel,
    attend,
    eager_attention,
    installed_flash_attention,
    usable,
)

__all__ = ["Kernel", "attend", "eager_attention", "installed_flash_attention", "usable"]

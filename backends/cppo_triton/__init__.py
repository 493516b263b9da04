"""Kernels in Triton, shared by the backends of the vendors that Triton compiles for.

Importing this imports no Triton: where it is not installed, PyTorch's own operations serve.
"""

from cppo_triton.tiling import Tiling
from cppo_triton.trial import token_statistics_for

__all__ = ["Tiling", "token_statistics_for"]

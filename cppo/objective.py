"""Per-token losses and how they add up: tensors in, tensors out; no model, no config, no I/O.

Shapes: B responses, T tokens (right-padded), N rewards in groups of G that lie side by side.
Log-probabilities are natural, of the sampled token under the temperature-scaled distribution.
Losses are to be minimised. Everything is computed in float32, or in float64 where an input is it.

Padding may hold anything, NaN and infinity included. A function that takes a mask replaces padded
inputs before any arithmetic; one that takes none may return anything there, but sends back a zero
gradient for every token whose loss is left out of the aggregate.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Divergence = Literal["k3", "k1"]
Aggregation = Literal["token-mean", "sequence-mean", "sequence-sum-norm"]

LOG_RATIO_BOUND = 20.0
DIVERGENCE_BOUND = 10.0
# float32 holds e^88: up to e^80 a policy ratio is exact, beyond it neither overflows nor learns.
POLICY_LOG_RATIO_BOUND = 80.0


def _check_option(name: str, given: str, options: Any) -> None:
    allowed = get_args(options)
    if given not in allowed:
        raise ValueError(f"{name}={given!r} is unknown: choose one of {', '.join(allowed)}")


def _check_shapes(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes differ: {given}; pass tensors of one shape")


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _estimate_divergence(logprobs: Tensor, other: Tensor, kind: Divergence) -> Tensor:
    d = (_widen(other) - _widen(logprobs)).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    # expm1 and not exp: for close policies e^d - 1 would lose every digit of d^2 / 2.
    estimate = torch.expm1(d) - d if kind == "k3" else -d
    return estimate.clamp(-DIVERGENCE_BOUND, DIVERGENCE_BOUND)


def divergence(logprobs: Tensor, other: Tensor, kind: Divergence = "k3") -> Tensor:
    """Estimates KL(p || other) at each sampled token, p being the policy behind `logprobs`.

    With d = other - logprobs, clamped to +-20: "k3" is e^d - d - 1 and "k1" is -d, both clamped to
    +-10. No gradient passes where a clamp binds: for k3 that is d above about 2.61 or below about
    -11. Against a reference policy, "k3" is the usual reference KL.

    `logprobs` and `other` are (B, T), and so is the result, in nats. Raises ValueError for shapes
    that differ or an unknown kind. Source: 2601.00501 and its published code.
    """
    _check_shapes(logprobs=logprobs, other=other)
    _check_option("kind", kind, Divergence)
    return _estimate_divergence(logprobs, other, kind)


def contrastive_perception_loss(
    logprobs: Tensor,
    preserved_logprobs: Tensor,
    removed_logprobs: Tensor,
    mask: Tensor,
    *,
    temperature: float = 0.1,
    divergence: Divergence = "k3",
) -> Tensor:
    """InfoNCE with one positive and one negative view: stay close to I+, move away from I-.

    softplus((KL(p || p+) - KL(p || p-)) / temperature) at each token that `mask` keeps: perception
    tokens of responses with a positive advantage. Gradients flow to all three views.

    All tensors are (B, T); so is the result, zero outside the mask. Raises ValueError for shapes
    that differ, an unknown divergence or a temperature that is not positive. Source: 2601.00501.
    """
    _check_shapes(
        logprobs=logprobs,
        preserved_logprobs=preserved_logprobs,
        removed_logprobs=removed_logprobs,
        mask=mask,
    )
    _check_option("divergence", divergence, Divergence)
    seen, preserved, removed = (
        torch.where(mask.bool(), view, 0.0)
        for view in (logprobs, preserved_logprobs, removed_logprobs)
    )
    to_preserved = _estimate_divergence(seen, preserved, divergence)
    to_removed = _estimate_divergence(seen, removed, divergence)
    return contrast_divergences(to_preserved, to_removed, mask, temperature=temperature)


def contrast_divergences(
    to_preserved: Tensor, to_removed: Tensor, mask: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """`contrastive_perception_loss` of divergences that are known, whatever their kind.

    softplus((to_preserved - to_removed) / temperature) at each token that `mask` keeps, in nats.
    All tensors are (B, T); so is the result, zero outside the mask. Raises ValueError for shapes
    that differ or a temperature that is not positive. Source: 2601.00501.
    """
    _check_shapes(to_preserved=to_preserved, to_removed=to_removed, mask=mask)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; the paper uses 0.1")
    mask = mask.bool()
    to_preserved = torch.where(mask, _widen(to_preserved), 0.0)
    to_removed = torch.where(mask, _widen(to_removed), 0.0)
    # -logsigmoid(-x) is softplus(x) without the cut to x above 20 that torch's softplus makes.
    loss = -logsigmoid((to_removed - to_preserved) / temperature)
    return torch.where(mask, loss, 0.0)


def group_advantages(
    rewards: Tensor, group_size: int, *, normalize: bool = True, epsilon: float = 1e-6
) -> Tensor:
    """Each response's reward against the mean of its group.

    `rewards` is (N,), the responses to one prompt side by side. With `normalize` the difference is
    divided by the group's sample standard deviation + epsilon (GRPO); without, it is left as it is
    (Dr.GRPO, 2503.20783). A group without spread gets exactly zero.

    Returns (N,). Raises ValueError for a group of one (nothing to compare with), or where the
    group size does not divide N.
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: a group needs at least 2 responses to compare")
    if rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}: pass (N,) with N a multiple of "
            f"group_size={group_size}"
        )
    grouped = _widen(rewards).view(-1, group_size)
    advantages = grouped - grouped.mean(-1, keepdim=True)
    if normalize:
        advantages = advantages / (grouped.std(-1, keepdim=True) + epsilon)
    # Rounding leaves the mean of equal rewards beside them, and a gate at zero would let it pass.
    has_spread = (grouped != grouped[:, :1]).any(-1, keepdim=True)
    return torch.where(has_spread, advantages, 0.0).flatten()


def _clip_surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    if advantages.shape == log_ratio.shape[:-1]:
        advantages = advantages.unsqueeze(-1).expand_as(log_ratio)
    if advantages.shape != log_ratio.shape:
        raise ValueError(
            f"advantages have shape {tuple(advantages.shape)}: pass one per response, "
            f"{tuple(log_ratio.shape[:-1])}, or one per token, {tuple(log_ratio.shape)}"
        )
    advantages = _widen(advantages)
    # The clamp also stops the gradient at a log ratio of NaN, and `known` at such an advantage;
    # the value stays NaN, so that a bad response token shows in the loss.
    ratio = log_ratio.clamp(-POLICY_LOG_RATIO_BOUND, POLICY_LOG_RATIO_BOUND).exp()
    known = advantages.isfinite()
    weights = torch.where(known, advantages, 0.0)
    surrogate = torch.minimum(ratio * weights, ratio.clamp(1 - low, 1 + high) * weights)
    return torch.where(known, -surrogate, torch.nan)


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """The clipped policy-gradient loss, token by token.

    -min(r A, clamp(r, 1 - low, 1 + high) A) with r = e^(logprobs - old_logprobs).

    `logprobs` and `old_logprobs` are (B, T), `advantages` (B,) or (B, T), the result (B, T). Raises
    ValueError for shapes that do not fit. Source: PPO, 1707.06347; two bounds: DAPO, 2503.14476.
    """
    _check_shapes(logprobs=logprobs, old_logprobs=old_logprobs)
    return _clip_surrogate(_widen(logprobs) - _widen(old_logprobs), advantages, low, high)


def sequence_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    low: float = 3e-4,
    high: float = 4e-4,
) -> Tensor:
    """The clipped loss on the ratio of whole responses (GSPO), in its token form.

    The ratio of a response is s = e^(mean over its tokens of logprobs - old_logprobs). Each token
    carries s p / stop_gradient(p): the value s everywhere in the response, and a gradient through
    its own log-probability alone. With one advantage per response, "sequence-mean" over the same
    mask then has exactly the value and the gradient of -min(s A, clamp(s, 1 - low, 1 + high) A)
    averaged over responses; advantages per token, and masks that drop tokens, keep their meaning.

    `logprobs`, `old_logprobs` and `mask` are (B, T), `advantages` (B,) or (B, T), the result
    (B, T), zero outside the mask. Raises ValueError for shapes that do not fit. Source: 2507.18071
    (GSPO-token).
    """
    _check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    mask = mask.bool()
    logprobs = torch.where(mask, _widen(logprobs), 0.0)
    log_ratio = logprobs.detach() - torch.where(mask, _widen(old_logprobs), 0.0)
    response_log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    token_log_ratio = response_log_ratio + (logprobs - logprobs.detach())
    return torch.where(mask, _clip_surrogate(token_log_ratio, advantages, low, high), 0.0)


def count_units(mask: Tensor, mode: Aggregation) -> Tensor:
    """What `aggregate` divides by where it is given no denominator.

    The tokens kept for "token-mean"; the sequences with any token kept for the other two. Add the
    counts of all micro-batches and ranks for the denominator of the global batch. `mask` is (B, T);
    returns an integer scalar. Raises ValueError for an unknown mode.
    """
    _check_option("mode", mode, Aggregation)
    mask = mask.bool()
    return mask.sum() if mode == "token-mean" else mask.any(-1).sum()


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    mode: Aggregation = "token-mean",
    *,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Adds per-token losses up to one number.

    "token-mean": the sum over kept tokens, divided by their number (DAPO, 2503.14476).
    "sequence-mean": the sum over sequences of each one's mean over its kept tokens, divided by the
    number of sequences with any (GRPO, GSPO).
    "sequence-sum-norm": the sum over kept tokens divided by a constant (Dr.GRPO, 2503.20783: the
    number of responses in the batch times the longest response allowed). Without a denominator, the
    number of sequences with any token kept.

    Give the `denominator` of the global batch, a positive scalar (`count_units` added over all
    micro-batches and ranks, or Dr.GRPO's constant), and the results of its pieces, cut between
    sequences, add up to the result for the whole; so do their gradients. Where ranks average
    gradients instead of adding them, multiply by the number of ranks.

    `per_token` and `mask` are (B, T). Returns a scalar; an empty mask gives 0 with zero gradient
    whatever the denominator. Raises ValueError for shapes that differ or an unknown mode.
    """
    _check_shapes(per_token=per_token, mask=mask)
    count = count_units(mask, mode)
    mask = mask.bool()
    losses = torch.where(mask, _widen(per_token), 0.0)
    if mode == "sequence-mean":
        losses = losses / mask.sum(-1, keepdim=True).clamp(min=1)
    divisor = torch.as_tensor(
        count if denominator is None else denominator, dtype=losses.dtype, device=losses.device
    )
    return losses.sum() / torch.where(mask.any(), divisor, 1.0)

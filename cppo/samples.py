"""Samples as rows to score, and scores as the tokens of a mini-batch; plain bookkeeping of tensors.

Shapes: B samples, T response tokens (right-padded).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from cppo.methods import Average, Plan, Scores, Tokens, View
from cppo.policy import Prompt, Row

AS_IT_IS = ""  # among views, the image itself


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One response to learn from."""

    prompt: Prompt
    ids: Tensor  # (length,)
    advantage: float
    views: Mapping[str, Prompt] = field(default_factory=dict)  # the prompt on those it needs
    old_logprobs: Tensor | None = None  # (length,); None: the policy is still the one that sampled
    reference_logprobs: Tensor | None = None  # (length,)
    idle: bool = False  # scored to keep processes in step, and not counted


def rows_of(samples: Sequence[Sample], views: Sequence[View]) -> dict[str, dict[int, Row]]:
    """Each sample's row on its image, and on those of the views that it has: by view, `AS_IT_IS`
    the first, and by the sample's number."""
    seen = {n: Row(prompt=s.prompt, response=s.ids) for n, s in enumerate(samples)}
    return {AS_IT_IS: seen, **on_views(samples, views, seen)}


def on_views(
    samples: Sequence[Sample], views: Sequence[View], seen: Mapping[int, Row]
) -> dict[str, dict[int, Row]]:
    """The rows on views alone; `seen` are the same samples' rows on their images."""
    return {
        view.name: {
            number: Row(
                prompt=sample.views[view.name],
                response=sample.ids,
                against=seen[number] if view.full_divergence else None,
            )
            for number, sample in enumerate(samples)
            if view.name in sample.views
        }
        for view in views
    }


def flat(rows: Mapping[str, Mapping[int, Row]]) -> list[Row]:
    return [row for of_view in rows.values() for row in of_view.values()]


def chosen_tokens(
    plan: Plan, views: Sequence[View], rows: Mapping[str, Mapping[int, Row]]
) -> list[Tensor]:
    """The tokens that the loss reads on these views: of each row, in order, (length,) bool."""
    return [
        plan.averages[view.read_on].mask[number, : len(row.response)]
        for view in views
        for number, row in rows[view.name].items()
    ]


def spread(scored: Scores, rows: slice, places: Tensor, mask: Tensor) -> Scores:
    """These rows, put to their places in the shape of `mask` (B, T); zeros elsewhere."""
    width = mask.shape[1]

    def put(values: Tensor) -> Tensor:
        own = values[rows, :width]
        blank = values.new_zeros(mask.shape)
        return blank.index_copy(0, places, pad(own, (0, width - own.shape[1])))

    return Scores.combined(put, scored)


def detached(tokens: Tokens) -> Tokens:
    still = {name: Scores.combined(Tensor.detach, scores) for name, scores in tokens.views.items()}
    return replace(tokens, seen=Scores.combined(Tensor.detach, tokens.seen), views=still)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """One record of several, padded to the longest; without what plans do not read."""
    width = max(part.mask.shape[1] for part in parts)

    def join(*tensors: Tensor) -> Tensor:
        return torch.cat([pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    return replace(
        parts[0],
        mask=join(*(part.mask for part in parts)),
        advantages=torch.cat([part.advantages for part in parts]),
        old_logprobs=join(*(part.old_logprobs for part in parts)),
        seen=Scores.combined(join, *(part.seen for part in parts)),
        views={
            name: Scores.combined(join, *(part.views[name] for part in parts))
            for name in parts[0].views
        },
        reference_logprobs=None,
    )


def split(plan: Plan, parts: Sequence[Tokens]) -> list[Plan]:
    """The plan of a joined record, cut back into its parts."""
    plans, start = [], 0
    for part in parts:
        size, width = part.mask.shape
        rows = slice(start, start + size)
        averages = {
            name: Average(mask=average.mask[rows, :width], mode=average.mode)
            for name, average in plan.averages.items()
        }
        plans.append(Plan(advantages=plan.advantages[rows, :width], averages=averages))
        start += size
    return plans

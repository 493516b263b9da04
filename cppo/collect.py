"""Collecting experience: prompts in, groups of rewarded responses out, ready to learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from PIL.Image import Image

from cppo.ask_again import ask_again
from cppo.config import RolloutConfig
from cppo.data import Feed, Item
from cppo.methods import GRPO
from cppo.perturb import view_seed
from cppo.policy import Policy, Prompt, encode_item, encode_view
from cppo.reward import SECOND_LOOKS, Grader, Reward
from cppo.rollout import Response, Sampling, generate
from cppo.samples import Sample

Gather = Callable[[list[Any]], list[Any]]  # lists of all processes, joined in order of rank


@dataclass(kw_only=True, eq=False)
class Group:
    """A prompt, its responses, and what each of them earned.

    `replies` are those without the images, where the method asks for them; None where it did not.
    """

    prompt: Prompt
    responses: list[Response]
    rewards: list[Reward]
    replies: list[str | None] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)

    def teaches(self, method: GRPO) -> bool:
        """Whether rewards differ; where groups are resampled, as in DAPO, accuracies must."""
        values = [r.accuracy if method.resample else r.total for r in self.rewards]
        return max(values) - min(values) > 1e-9


class Encoder:
    """Encodes items as the feed checks them, and keeps the prompts until they are taken. Those
    with equal images share their pixels."""

    def __init__(self, policy: Policy, *, instruction: str | None, max_tokens: int) -> None:
        self._policy, self._max_tokens = policy, max_tokens
        self._instruction = policy.instruction if instruction is None else instruction
        self._prompts: dict[str, Prompt] = {}
        self._by_images: dict[tuple[bytes, ...], Prompt] = {}

    def check(self, item: Item) -> None:
        """Raises BadRow where the item makes no prompt."""
        images = tuple(map(_digest, item.images))
        prompt = encode_item(
            self._policy,
            item,
            instruction=self._instruction,
            max_tokens=self._max_tokens,
            like=self._by_images.get(images),
        )
        self._prompts[item.row] = self._by_images[images] = prompt

    def take(self, items: Sequence[Item]) -> list[Prompt]:
        """The prompts of items that were checked; all that is kept is let go."""
        prompts = [self._prompts[item.row] for item in items]
        self._prompts, self._by_images = {}, {}
        return prompts


def _digest(image: Image) -> bytes:
    """Of an RGB image, as all items have them."""
    return blake2b(image.tobytes(), person=b"%dx%d" % image.size).digest()


class Collector:
    """Rolls out the policy on the feed's prompts and grades what it says."""

    def __init__(
        self,
        *,
        policy: Policy,
        method: GRPO,
        feed: Feed,
        encoder: Encoder,
        grader: Grader,
        settings: RolloutConfig,
        steps: int,
        seed: int,
        rank: int,
        world: int,
        gather: Gather,
    ) -> None:
        self._policy, self._method, self._settings = policy, method, settings
        self._steps = steps
        self._feed, self._encoder, self._grader = feed, encoder, grader
        self._seed, self._rank, self._world, self._gather = seed, rank, world, gather
        self._sampling = Sampling(
            responses=settings.responses,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            batch_responses=settings.batch_responses,
            compile=settings.compile,
        )

    def collect(self, step: int) -> list[Group]:
        """This process's groups of one step, advantages set; groups without spread among them.

        Where the method resamples, new prompts take the place of groups without spread, for at
        most `max_resamples` rounds.
        """
        wanted = self._settings.prompts // self._world
        groups = self._roll_out(step, 0)
        for attempt in range(1, 1 + self._settings.max_resamples * self._method.resample):
            teaching = [group for group in groups if group.teaches(self._method)]
            if not any(self._gather([len(teaching) < wanted])):
                break
            fresh = self._roll_out(step, attempt)
            flat = [group for group in (*groups, *fresh) if not group.teaches(self._method)]
            teaching += [group for group in fresh if group.teaches(self._method)]
            groups = (teaching + flat)[:wanted]
        self._set_advantages(groups)
        return groups

    def samples(self, group: Group, step: int) -> list[Sample]:
        """A group's responses, with the views that the loss needs, each encoded once."""
        advantages = torch.tensor(group.advantages)
        views: list[dict[str, Prompt]] = [{} for _ in group.responses]
        for view in self._method.views:
            needed = view.needed(advantages).tolist()
            if any(needed):
                shown = encode_view(self._policy, group.prompt, view, seed=self._seed, step=step)
                for seen, wanted in zip(views, needed, strict=True):
                    if wanted:
                        seen[view.name] = shown
        return [
            Sample(prompt=group.prompt, ids=response.ids, advantage=advantage, views=seen)
            for response, advantage, seen in zip(
                group.responses, group.advantages, views, strict=True
            )
        ]

    def _roll_out(self, step: int, attempt: int) -> list[Group]:
        prompts = self._encoder.take(self._feed.take(self._settings.prompts))
        generator = torch.Generator(self._policy.device)
        drawn = view_seed(self._seed, f"rank {self._rank}", f"rollout {attempt}", step)
        generator.manual_seed(drawn)
        answered = self._sample(prompts, step, generator)
        replies = self._ask_again(prompts, answered, generator)
        earning = [
            (response.text, prompt.item.answer, prompt.item.question)
            + (() if reply is None else (reply,))
            for prompt, responses, own in zip(prompts, answered, replies, strict=True)
            for response, reply in zip(responses, own, strict=True)
        ]
        rewards = iter(self._grader.grade(earning))
        return [
            Group(
                prompt=prompt,
                responses=responses,
                rewards=[next(rewards) for _ in responses],
                replies=own,
            )
            for prompt, responses, own in zip(prompts, answered, replies, strict=True)
        ]

    def _ask_again(
        self,
        prompts: Sequence[Prompt],
        answered: Sequence[Sequence[Response]],
        generator: torch.Generator,
    ) -> list[list[str | None]]:
        """A reply without the images to each response, where the method's reward is of it too."""
        name = self._method.second_look
        if name is None:
            return [[None] * len(responses) for responses in answered]
        look = SECOND_LOOKS[name]
        return ask_again(self._policy, look, prompts, answered, self._sampling, generator)

    def _sample(
        self, prompts: Sequence[Prompt], step: int, generator: torch.Generator
    ) -> list[list[Response]]:
        """Responses to each prompt; where the method has it so, half of them on another view."""
        view = self._method.rollout_view((step - 1) / self._steps)
        if view is None:
            return list(generate(self._policy, prompts, self._sampling, generator))
        shown = [encode_view(self._policy, p, view, seed=self._seed, step=step) for p in prompts]
        half = self._sampling.responses // 2
        plainly = replace(self._sampling, responses=self._sampling.responses - half)
        answered = generate(self._policy, prompts, plainly, generator)
        others = generate(self._policy, shown, replace(plainly, responses=half), generator)
        return [own + other for own, other in zip(answered, others, strict=True)]

    def _set_advantages(self, groups: Sequence[Group]) -> None:
        """Over the groups of all processes, since a method may normalise over the batch."""
        own = [[reward.total for reward in group.rewards] for group in groups]
        everyone = torch.tensor(self._gather(own), dtype=torch.float64)
        advantages = self._method.score_groups(everyone.flatten(), self._settings.responses)
        first = self._rank * len(groups)
        for group, values in zip(groups, advantages.view_as(everyone)[first:], strict=False):
            group.advantages = values.tolist()

"""Asking the policy again, without the image, about what its responses say is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cppo.data import PLACEHOLDER, BadRow
from cppo.policy import Policy, Prompt, encode_item
from cppo.reward import SecondLook
from cppo.rollout import Response, Sampling, generate

NO_LIMIT = 10**6  # tokens; what is asked holds no more than a prompt and a response did


def ask_again(
    policy: Policy,
    look: SecondLook,
    prompts: Sequence[Prompt],
    answered: Sequence[Sequence[Response]],
    sampling: Sampling,
    generator: torch.Generator,
) -> list[list[str | None]]:
    """What the policy replies to `look.ask` of each response; None where nothing is asked.

    Replies are sampled as responses are, and each response has one of its own: a reply that is
    shared by all who ask the same would tie their rewards to each other. What they ask is read once
    for all of them.

    Nothing is asked where the text holds what the tokenizer or the chat template has a special
    meaning for: it could end the question in its midst.
    """
    asking: dict[str, list[tuple[int, int]]] = {}  # text -> whose: prompt and response
    for number, (prompt, responses) in enumerate(zip(prompts, answered, strict=True)):
        question = prompt.item.question.replace(PLACEHOLDER, "").strip()
        for place, response in enumerate(responses):
            text = look.ask(response.text, question)
            if text is not None:
                asking.setdefault(text, []).append((number, place))
    tokens = policy.tokenizer.added_tokens_decoder.values()
    special = [token.content for token in tokens if token.special]
    asked: list[Prompt] = []
    whose: list[tuple[int, int]] = []
    for text, places in asking.items():
        if any(token in text for token in special):
            continue
        item = replace(prompts[places[0][0]].item, images=(), question=text)
        try:
            again = encode_item(policy, item, instruction="", max_tokens=NO_LIMIT)
        except BadRow:  # it holds what stands for an image
            continue
        asked += [again] * len(places)
        whose += places
    replies: list[list[str | None]] = [[None] * len(responses) for responses in answered]
    given = generate(policy, asked, replace(sampling, responses=1), generator)
    for (number, place), (reply,) in zip(whose, given, strict=True):
        replies[number][place] = reply.text
    return replies

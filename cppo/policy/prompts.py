"""Items into prompts: chat template, image tokens, positions; and prompts under other views."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from cppo.data import PLACEHOLDER, BadRow, Item
from cppo.methods import View
from cppo.perturb import perturb, view_seed
from cppo.policy.loading import Policy


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """An item as the model reads it, on one view of its images. L ids, N images."""

    item: Item
    ids: Tensor  # (L,), image tokens included
    image_mask: Tensor  # (L,) bool, the image tokens among them
    positions: Tensor  # (axes, L)
    next_position: int  # of the response's first token, on every axis
    pixels: Tensor  # what the vision tower sees of the images; empty where there are none
    grids: Tensor  # (N, k), what the family counts an image's tokens by
    blind: bool = False  # nothing attends to the image tokens


def encode_item(
    policy: Policy, item: Item, *, instruction: str, max_tokens: int, like: Prompt | None = None
) -> Prompt:
    """Encodes an item, `instruction` appended to its question. It may have no images.

    `like` is a prompt with equal images: its pixels are shared, the same tensor, so that they are
    processed once, and need to be seen by the vision tower once.

    Raises BadRow where the prompt exceeds `max_tokens`, where the question itself holds visual
    placeholder tokens, or where the image processor refuses an image.
    """
    family = policy.family
    pixels, grids = torch.empty(0), torch.empty(0, 0, dtype=torch.long)
    image_texts: list[str] = []
    if item.images:  # image processors refuse to be given none
        try:
            pixels, grids = (like.pixels, like.grids) if like else family.pixels(item.images)
        except ValueError as error:
            raise BadRow("image not usable", str(error), row=item.row) from error
        image_texts = family.image_texts(grids)
    text = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": _content(item.question + instruction)}],
        tokenize=False,
        add_generation_prompt=True,
    )
    pieces = text.split(family.placeholder)
    reserved = policy.tokenizer.convert_ids_to_tokens(family.image_token)
    if len(pieces) != len(item.images) + 1 or any(reserved in piece for piece in pieces):
        raise BadRow(
            "placeholder count",
            f"{len(pieces) - 1} image tokens for {len(item.images)} images: the question's text "
            "holds a token that the model reserves for images",
            row=item.row,
        )
    first, *others = pieces
    shown = zip(image_texts, others, strict=True)
    text = first + "".join(image + piece for image, piece in shown)
    ids: list[int] = policy.tokenizer(text, add_special_tokens=_lacks_start(policy, text)).input_ids
    if len(ids) > max_tokens:
        raise BadRow(
            "prompt too long",
            f"{len(ids)} tokens, {max_tokens} allowed: raise policy.max_prompt_tokens, or lower "
            "policy.max_pixels",
            row=item.row,
        )
    ids_L = torch.tensor(ids)
    positions, next_position = family.positions(policy.base, ids_L, grids)
    return Prompt(
        item=item,
        ids=ids_L,
        image_mask=ids_L == family.image_token,
        positions=positions,
        next_position=next_position,
        pixels=pixels,
        grids=grids,
    )


def encode_view(policy: Policy, prompt: Prompt, view: View, *, seed: int, step: int) -> Prompt:
    """The prompt with its images under a view; all else is as it was."""
    if view.blind:
        return replace(prompt, blind=True)
    pixels, grids = policy.family.pixels(
        [
            _perturbed(image, number, prompt.item.row, view, seed, step)
            for number, image in enumerate(prompt.item.images)
        ]
    )
    assert torch.equal(grids, prompt.grids), "a view must keep its images' sizes"
    return replace(prompt, pixels=pixels)


def _lacks_start(policy: Policy, text: str) -> bool:
    """Whether the tokenizer is to add its own special tokens, as transformers' processors decide:
    where the chat template has not written the first of them."""
    start = policy.tokenizer.bos_token
    return start is None or not text.startswith(start)


def _perturbed(
    image: Image.Image, number: int, row: str, view: View, seed: int, step: int
) -> Image.Image:
    if view.draw == "image":
        drawn = view_seed(seed, f"{row}#{number}", view.name, step)
    else:
        drawn = view_seed(seed, row, view.name, 0)
    names = sorted(view.perturbations)
    name = names[drawn % len(names)]
    return perturb(image, name, drawn, **view.perturbations[name])


def _content(question: str) -> list[dict[str, str]]:
    """The question as chat content, an image entry in place of each placeholder."""
    content: list[dict[str, str]] = []
    for number, text in enumerate(question.split(PLACEHOLDER)):
        if number:
            content.append({"type": "image"})
        if text:
            content.append({"type": "text", "text": text})
    return content

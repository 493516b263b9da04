"""Rewards that ask the policy again, without the image, about what it says is in it.

A response describes the picture, reasons, and answers. The same policy then answers the question
from the description alone; the description is worth what this reply is. Pure functions: whoever
rolls out samples a reply to `SecondLook.ask` (see `cppo.ask_again`) and has it graded with the
response. The grades are reward functions: they run in a `Grader`'s workers, and without a reply
they say what the response itself is worth, as in an evaluation.

Vision-SR1 (2508.19652): `<description>`, `<think>`, then a boxed answer; 0.9 accuracy + 0.1 format
+ 1.0 accuracy of the reply. Visionary-R1 (2505.14677): `<info>`, `<think>`, `<answer>`; accuracy +
format + 0.1 accuracy of the reply, which is 0 where the policy finds that the caption does more
than describe. The authors' code of the latter compares by the kind of question (exactly, by edit
distance or by ROUGE); here answers are compared as `same_answer` does. All wording is ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from cppo.reward.answers import final_answer, same_answer
from cppo.reward.functions import ACCURACY_WEIGHT, FORMAT_WEIGHT, Reward, accuracy

CAPTION_WEIGHT = 0.1
NO_DESCRIPTION = "NOT A DESCRIPTION"
_BOX_ALONE = re.compile(r"\s*\\boxed\s*\{(?P<answer>.*)\}\s*", re.DOTALL)
_ANSWER_MARKUP = re.compile(r"\\boxed|</?(?:think|answer)>")


@dataclass(frozen=True, kw_only=True)
class SecondLook:
    """How a reward asks the policy again.

    `instruction` is appended to the question that comes with the image. `ask` takes a response and
    the question without its image placeholders, and returns what to ask without the image, or None
    where there is nothing to ask about. `grade` is a function of a module, since a `Grader` imports
    it by `spec`: of the response, the gold answer, the question and the reply, which is left out
    where nothing was asked. `final` reads a response's own final answer, None where there is none.
    """

    instruction: str
    ask: Callable[[str, str], str | None]
    grade: Callable[..., Reward]
    final: Callable[[str], str | None]

    @property
    def spec(self) -> str:
        """The reward as `cppo.reward.resolve` takes it."""
        return f"{self.grade.__module__}:{self.grade.__qualname__}"


def section(response: str, tag: str) -> str | None:
    """What stands between `<tag>` and `</tag>`; None where it is blank, missing or doubled."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if response.count(opening) != 1 or response.count(closing) != 1:
        return None
    content, found, _ = response.partition(opening)[2].partition(closing)
    return content.strip() or None if found else None


def follows_sections(response: str, *tags: str) -> str | None:
    """What follows the sections, where a response is these, in this order, with nothing between.

    None where it is not: a section is missing, blank, doubled or out of place.
    """
    rest = response
    for tag in tags:
        if section(response, tag) is None or not rest.lstrip().startswith(f"<{tag}>"):
            return None
        rest = rest.partition(f"</{tag}>")[2]
    return rest


# --- Vision-SR1 ----------------------------------------------------------------------------------


def sr1_well_formed(response: str) -> bool:
    """Whether it is description, thought and one boxed answer, none blank, and nothing else."""
    rest = follows_sections(response, "description", "think")
    box = _BOX_ALONE.fullmatch(rest or "")
    return (
        box is not None
        and bool(box["answer"].strip())
        and response.count("\\boxed", response.index("</think>")) == 1
        and final_answer(response) == box["answer"]  # not two braces that happen to stand outside
    )


def sr1_ask(response: str, question: str) -> str | None:
    """The question again, the description in place of the image; None without a description.

    A description that holds the answer is not refused, as it is not in the authors' code.
    """
    description = section(response, "description")
    if description is None:
        return None
    return (
        f"A picture is described to you:\n\n{description}\n\n"
        f"You cannot see it. From the description alone, answer:\n\n{question}\n\n"
        "First think, between <think> and </think>; then give the answer in \\boxed{}."
    )


def sr1_reward(response: str, answer: str, question: str, reply: str | None = None) -> Reward:
    """``0.9 * accuracy + 0.1 * format + accuracy of the reply``; the question is not used."""
    correct, formed = accuracy(response, answer), float(sr1_well_formed(response))
    again = 0.0 if reply is None else accuracy(reply, answer)
    total = ACCURACY_WEIGHT * correct + FORMAT_WEIGHT * formed + again
    return Reward(total=total, accuracy=correct, format=formed, second_look=again)


# --- Visionary-R1 --------------------------------------------------------------------------------


def visionary_well_formed(response: str) -> bool:
    """Whether it is caption, thought and answer, none blank, and nothing else."""
    rest = follows_sections(response, "info", "think", "answer")
    return rest is not None and not rest.strip()


def visionary_ask(response: str, question: str) -> str | None:
    """Whether the caption only describes and, if so, the question again.

    None without a caption, and where the caption is marked up as an answer: such a one is not
    worth a reply (ours; the authors leave every judgement to the policy).
    """
    caption = section(response, "info")
    if caption is None or _ANSWER_MARKUP.search(caption):
        return None
    return (
        f"A text about a picture:\n\n{caption}\n\n"
        "If the text does anything but describe, if it answers, solves, explains or concludes, "
        f"reply {NO_DESCRIPTION} and nothing else. Otherwise answer this question from the text "
        f"alone, with a single word or phrase:\n\n{question}"
    )


def visionary_answer(response: str) -> str | None:
    """What stands between its answer tags; without them an answer is none."""
    return section(response, "answer")


def visionary_reward(response: str, answer: str, question: str, reply: str | None = None) -> Reward:
    """``accuracy + format + 0.1 * accuracy of the reply``; the question is not used."""
    formed, again = float(visionary_well_formed(response)), 0.0
    correct = float(same_answer(visionary_answer(response) or "", answer))
    if reply is not None and not declines(reply):
        given = section(reply, "answer") or final_answer(reply) or reply.strip()
        again = float(same_answer(given, answer))
    total = correct + formed + CAPTION_WEIGHT * again
    return Reward(total=total, accuracy=correct, format=formed, second_look=again)


def declines(reply: str) -> bool:
    """Whether a reply says that the text it was asked about does more than describe."""
    return NO_DESCRIPTION in reply.upper()


SECOND_LOOKS: dict[str, SecondLook] = {
    "vision_sr1": SecondLook(
        instruction=(
            "\nFirst describe the picture, between <description> and </description>, so that the "
            "question can be answered without it. Then think, between <think> and </think>. Then "
            "give the answer in \\boxed{}."
        ),
        ask=sr1_ask,
        grade=sr1_reward,
        final=final_answer,
    ),
    "visionary_r1": SecondLook(
        instruction=(
            "\nFirst describe everything in the picture, between <info> and </info>, without "
            "answering. Then think, between <think> and </think>. Then give the answer, a single "
            "word or phrase, between <answer> and </answer>."
        ),
        ask=visionary_ask,
        grade=visionary_reward,
        final=visionary_answer,
    ),
}

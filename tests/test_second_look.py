"""Laws of the rewards that ask the policy again without the image."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cppo.reward import Grader, Reward, extract_answer
from cppo.reward.second_look import (
    NO_DESCRIPTION,
    SECOND_LOOKS,
    declines,
    follows_sections,
    section,
    sr1_ask,
    sr1_reward,
    sr1_well_formed,
    visionary_ask,
    visionary_reward,
    visionary_well_formed,
)

ROOT = Path(__file__).parents[1]
SR1 = "<description>A 3 by 4 grid.</description>\n<think>3 times 4.</think>\n\\boxed{12}"
VISIONARY = "<info>A 3 by 4 grid.</info> <think>3 times 4.</think> <answer>12</answer>"
QUESTION = "How many cells are there?"


# --- sections -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<a> x\n y </a>", "x\n y"),
        ("before <a>x</a> after", "x"),
        ("<a><b>x</b></a>", "<b>x</b>"),
        ("", None),
        ("<a>x", None),
        ("x</a>", None),
        ("</a>x<a>", None),
        ("<a> \n </a>", None),
        ("<a>x</a><a>y</a>", None),
        ("<a>x</a></a>", None),
        ("<ab>x</ab>", None),
    ],
)
def test_a_section_is_what_stands_between_its_tags_once(text: str, content: str | None) -> None:
    assert section(text, "a") == content


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<a>1</a><b>2</b> 3", " 3"),
        (" <a>1</a>\n<b>2</b>", ""),
        ("0 <a>1</a><b>2</b>", None),
        ("<a>1</a> or <b>2</b>", None),
        ("<b>2</b><a>1</a>", None),
        ("<a>1 <b>2</b></a>", None),
        ("<a>1</a>", None),
        ("<a>1</a><b></b>", None),
    ],
)
def test_sections_follow_each_other_with_nothing_between(text: str, rest: str | None) -> None:
    assert follows_sections(text, "a", "b") == rest


# --- format -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "formed"),
    [
        (SR1, True),
        (SR1 + "\n", True),
        (SR1.replace("{12}", r"{\frac{1}{2}}"), True),
        (SR1.replace("3 times 4.", r"3 times 4: \boxed{12}"), True),  # a thought may box
        (SR1 + ".", False),
        ("Well: " + SR1, False),
        (SR1.replace("{12}", "{}"), False),
        (SR1.replace("{12}", "{12"), False),
        (SR1.replace("{12}", "{1} and {2}"), False),
        (SR1 + r"\boxed{12}", False),
        (SR1.replace("3 times 4.", " "), False),
        (SR1.replace("A 3 by 4 grid.", ""), False),
        (SR1.replace("description", "info"), False),
        ("<think>3 times 4.</think>\n\\boxed{12}", False),
        ("", False),
    ],
)
def test_an_sr1_response_is_description_thought_and_one_box(response: str, formed: bool) -> None:
    assert sr1_well_formed(response) is formed


@pytest.mark.parametrize(
    ("response", "formed"),
    [
        (VISIONARY, True),
        (VISIONARY + "\n", True),
        (VISIONARY + " 12", False),
        (VISIONARY.replace(">12<", "> <"), False),
        (VISIONARY.replace("info", "description"), False),
        (VISIONARY + "<answer>13</answer>", False),
        ("<think>3 times 4.</think> <info>A grid.</info> <answer>12</answer>", False),
        (SR1, False),
    ],
)
def test_a_visionary_response_is_caption_thought_and_answer(response: str, formed: bool) -> None:
    assert visionary_well_formed(response) is formed


# --- what is asked ------------------------------------------------------------------------------


def test_the_policy_is_asked_from_the_description_alone() -> None:
    for ask, response in ((sr1_ask, SR1), (visionary_ask, VISIONARY)):
        asked = ask(response, QUESTION)
        assert asked is not None
        assert "A 3 by 4 grid." in asked
        assert QUESTION in asked
        assert "3 times 4" not in asked  # neither thought nor answer
        assert "12" not in asked
        assert ask("<think>3 times 4.</think> 12", QUESTION) is None
    asked = visionary_ask(VISIONARY, QUESTION)
    assert asked is not None
    assert NO_DESCRIPTION in asked


@pytest.mark.parametrize("hidden", [r"It is \boxed{12}.", "<answer>12", "</think>12"])
def test_a_caption_that_is_marked_up_as_an_answer_is_not_asked_about(hidden: str) -> None:
    assert visionary_ask(f"<info>A grid. {hidden}</info>", QUESTION) is None
    assert visionary_ask("<info>A grid labelled 12.</info>", QUESTION) is not None


# --- what is earned -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "reply", "expected"),
    [
        (SR1, r"<think>x</think>\boxed{12}", (2.0, 1, 1, 1)),
        (SR1, r"<think>x</think>\boxed{11}", (1.0, 1, 1, 0)),
        (SR1, "12", (1.0, 1, 1, 0)),  # a reply boxes its answer too
        (SR1, None, (1.0, 1, 1, 0)),
        (SR1.replace("12", "11"), r"\boxed{12}", (1.1, 0, 1, 1)),
        (SR1 + ".", r"\boxed{12}", (1.9, 1, 0, 1)),
        ("no idea", None, (0.0, 0, 0, 0)),
    ],
)
def test_sr1_adds_what_the_reply_earns(
    response: str, reply: str | None, expected: tuple[float, float, float, float]
) -> None:
    assert earned(sr1_reward, response, reply) == pytest.approx(expected)


def earned(
    grade: Callable[..., Reward], response: str, reply: str | None
) -> tuple[float, float, float, float]:
    given = () if reply is None else (reply,)
    found = grade(response, "12", QUESTION, *given)
    return found.total, found.accuracy, found.format, found.second_look


@pytest.mark.parametrize(
    ("response", "reply", "expected"),
    [
        (VISIONARY, "12", (2.1, 1, 1, 1)),
        (VISIONARY, " 12.0 ", (2.1, 1, 1, 1)),
        (VISIONARY, "<think>x</think><answer>12</answer>", (2.1, 1, 1, 1)),
        (VISIONARY, r"so \boxed{12}", (2.1, 1, 1, 1)),
        (VISIONARY, "11", (2.0, 1, 1, 0)),
        (VISIONARY, NO_DESCRIPTION, (2.0, 1, 1, 0)),
        (VISIONARY, f"{NO_DESCRIPTION.lower()}. 12", (2.0, 1, 1, 0)),
        (VISIONARY, None, (2.0, 1, 1, 0)),
        (VISIONARY.replace("12", "11"), "12", (1.1, 0, 1, 1)),
        (VISIONARY + " done", "12", (1.1, 1, 0, 1)),
        ("12", "12", (0.1, 0, 0, 1)),  # without its tags an answer is none
        ("", None, (0.0, 0, 0, 0)),
    ],
)
def test_visionary_adds_a_tenth_of_what_the_reply_earns(
    response: str, reply: str | None, expected: tuple[float, float, float, float]
) -> None:
    assert earned(visionary_reward, response, reply) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "response"), [("vision_sr1", SR1), ("visionary_r1", VISIONARY)])
def test_workers_grade_with_and_without_a_reply(name: str, response: str) -> None:
    look = SECOND_LOOKS[name]
    items = [
        (response, "12", QUESTION),
        (response, "12", QUESTION, r"\boxed{12}"),
        (response, "11", QUESTION, r"\boxed{12}"),
    ]
    with Grader(look.spec, workers=1) as grader:
        assert grader.grade(items) == [look.grade(*item) for item in items]
    assert not grader.failures


@pytest.mark.parametrize(("name", "response"), [("vision_sr1", SR1), ("visionary_r1", VISIONARY)])
def test_a_response_votes_for_the_answer_that_it_is_graded_by(name: str, response: str) -> None:
    look = SECOND_LOOKS[name]
    other = response.replace("12", "12.0")
    assert [extract_answer(each, look.final) for each in (response, other)] == ["12", "12"]
    assert look.grade(other, "12", QUESTION).accuracy == 1
    for unmarked in ("12", response.replace("}", "").replace("</answer>", "")):
        assert extract_answer(unmarked, look.final) == ""
        assert look.grade(unmarked, "12", QUESTION).accuracy == 0


def test_a_reply_that_calls_the_caption_an_answer_declines() -> None:
    assert declines(f"{NO_DESCRIPTION}.")
    assert not declines("A description.")


def test_instructions_ask_for_what_the_format_wants() -> None:
    for look, response, tags in (
        ("vision_sr1", SR1, ("<description>", "</description>", "<think>", "\\boxed{}")),
        ("visionary_r1", VISIONARY, ("<info>", "</info>", "<think>", "<answer>", "</answer>")),
    ):
        assert all(tag in SECOND_LOOKS[look].instruction for tag in tags)
        grade = SECOND_LOOKS[look].grade
        assert grade(response, "12", QUESTION).format == 1
        assert SECOND_LOOKS[look].ask(response, QUESTION) is not None


def test_they_load_without_torch() -> None:
    program = "import sys, cppo.reward.second_look; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

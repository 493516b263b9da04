"""The laws of `cppo.reward`: which answers are the same, and a time limit that always holds.

The hazards below are real: processes are hung, crashed and killed.
"""

import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cppo.reward import (
    Grader,
    Reward,
    accuracy,
    close,
    default_reward,
    extract_answer,
    final_answer,
    resolve,
    same_answer,
    well_formed,
)
from cppo.reward.answers import _parsed

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
FOLDERS = ("geometry3k-mini", "dynamath-mini", "puzzlevqa-mini")
ZERO = Reward(total=0.0, accuracy=0.0, format=0.0)


def boxed(answer: str) -> str:
    return f"<think>x</think> \\boxed{{{answer}}}"


# --- Reading a response --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed {5}", "5"),
        (r"\boxed{x = \boxed{7}}", "7"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"{ \boxed{3}", "3"),
        (r"} \boxed{3}", "3"),
        (r"\\\boxed{3}", "3"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> none", None),
        (r"<think>\boxed{1}", "1"),
        (r"</think>\boxed{1}</think> \boxed{2}", "2"),
        ("5", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_last_balanced_box_behind_the_thought(
    response: str, answer: str | None
) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"<think>because</think> \boxed{5}", True),
        ("\n<think>\nbecause\n</think>\nso\n" r"\boxed{\frac{1}{2}}." "\n", True),
        (r"<think>maybe \boxed{4}</think> \boxed{5}", True),
        (r"<think> </think> \boxed{5}", False),
        (r"<think>because</think> 5", False),
        (r"<think>because</think> \boxed{}", False),
        (r"<think>because</think> \boxed{5", False),
        (r"<think>because</think> \boxed{5} \boxed{5}", False),
        (r"<think>because</think> \boxed{\boxed{5}}", False),
        (r"<think>because</think> \boxed{5} \boxed", False),
        (r"because</think> \boxed{5}", False),
        (r"<think>because \boxed{5}", False),
        (r"so <think>because</think> \boxed{5}", False),
        (r"<think>a</think><think>b</think> \boxed{5}", False),
        (r"<think><think>a</think> \boxed{5}", False),
        (r"<think>a</think></think> \boxed{5}", False),
        (r"\boxed{5}", False),
        ("", False),
    ],
)
def test_a_well_formed_response_is_one_thought_and_one_box(response: str, expected: bool) -> None:
    assert well_formed(response) is expected


def test_the_default_reward_weighs_accuracy_nine_to_one_against_format() -> None:
    right, wrong = r"<think>x</think>\boxed{5}", r"<think>x</think>\boxed{6}"
    assert default_reward(right, "5", "") == Reward(total=1.0, accuracy=1.0, format=1.0)
    assert default_reward(r"\boxed{5}", "5", "") == Reward(total=0.9, accuracy=1.0, format=0.0)
    assert default_reward(wrong, "5", "") == Reward(total=0.1, accuracy=0.0, format=1.0)
    assert default_reward("5", "5", "") == ZERO


@pytest.mark.parametrize(
    ("answers", "canonical"),
    [
        (("B", "(B)", "b", "B.", r"\text{B}", "option B", "B) 12"), "B"),
        (("0.5", "1/2", r"\frac12", r"\dfrac{1}{2}", ".50", r"0.5 \text{ cm}", "x = 0.5"), "0.5"),
        (("1500", "1,500", r"1{,}500", "1.5e3", r"1.5 \times 10^{3}"), "1500"),
        ((r"25\%", "25 %", "25 percent"), "25%"),
        (("(2,4)", r"\left(2, 4\right)", "( 2.0 , 4.0 )"), "(2,4)"),
        ((r"5\sqrt{3}", r"5 \sqrt { 3 }", "$5√3$"), r"5\sqrt{3}"),
        (("White", "white.", r"\text{ White }", "'white'".strip("'")), "white"),
        (("September", "sept", "Sep."), "sep"),
        (("",), ""),
    ],
)
def test_one_answer_written_in_several_ways_is_one_vote(
    answers: tuple[str, ...], canonical: str
) -> None:
    assert {extract_answer(boxed(answer)) for answer in answers} == {canonical}


def test_answers_that_differ_are_different_votes() -> None:
    answers = [
        "5",
        "-5",
        "5.01",
        "(5, 6)",
        "(6, 5)",
        "[5, 6]",
        "A",
        "B",
        "x",
        "2x",
        "1 1/2",
        "11/2",
    ]
    assert len({extract_answer(boxed(answer)) for answer in answers}) == len(answers)


# --- Which answers are the same ------------------------------------------------------------------

SAME: dict[str, list[str]] = {
    "B": [
        "(B)", "B.", "b", "(b)", "[B]", "**B**", r"\text{B}", r"\textbf{(B)}", r"\mathrm{B}", "B)",
        "B) 12", "(B) 12", "B. 12", "B: circle", "option B", "Option (B)", "The answer is B",
        "The correct option is (B).",
    ],
    r"\boxed{B}": ["B", r"\text{B}"],
    "(B)": ["B", "b"],
    "A": ["(A) A", "a"],
    "80": [
        r"80^\circ", "80°", "80 degrees", r"m\angle ABC = 80^\circ", "x=80", "80.0", "+80", r"\$80",
        r"80\%", r"80 \text{ cm}", "80 cm^2", r"80\,\mathrm{cm}^2", r"80 \text{ square units}",
        "160/2", r"\frac{160}{2}", r"8 \times 10^1", "8e1", "3+77", "x = 3+77 = 80", "80 apples",
        r"80\text{ red apples}", "(80)", r"\text{Area} = 80", "f(2) = 80", "80.", "$80$", r"\(80\)",
    ],
    "-5": ["−5", "- 5", "-5.0", r"-\frac{10}{2}"],  # noqa: RUF001
    "1500": ["1,500", r"1{,}500", r"1\,500", "1 500", "1.5 thousand", "1.5e3", r"\$1,500.00"],
    "1.5 million": ["1,500,000", "1500000", r"1.5\times10^6"],
    "0.4": ["2/5", r"\frac25", r"\tfrac{2}{5}", r"40\%", ".4", "0.40 m"],
    "0.3333": ["1/3", r"\frac13"],
    "2.0944": [r"2\pi/3", r"\frac{2\pi}{3}", r"\frac{2}{3}\pi", "2π/3", "2.094"],
    "3.1416": [r"\pi", "π", "3.1416 radians"],
    "199.4849": ["199.48"],
    "-16.899999999999995": ["-16.9"],
    "166.6667": [r"\frac{500}{3}"],
    "0": ["0.0", r"\sin \pi", "0 m/s"],
    "25%": ["25", "0.25", r"25\%", r"\frac{1}{4}"],
    r"3\frac{1}{2}": ["3.5", "7/2", "3 1/2"],
    r"-\frac{1}{2}": ["-0.5", r"\frac{-1}{2}", r"\frac{1}{-2}"],
    "5 cm": ["5", "5 centimeters", r"5\text{cm}", "5cm"],
    r"5 \text{ cm}^2": ["5 square centimeters", "5 sq cm", "5 cm²", "5"],
    "5 m/s^2": ["5 meters per second^2", r"5\,\text{m/s}^2"],
    "2m": ["m+m", "2 m"],
    r"5 \sqrt { 3 }": [
        r"5\sqrt{3}", r"5\sqrt3", "5√3", "5√(3)", "8.66", r"\sqrt{75}", r"\frac{15}{\sqrt{3}}",
        r"x = 5\sqrt{3}", r"5\sqrt{3} \approx 8.66", r"x \approx 8.66", r"5\sqrt{3}\text{ cm}",
        "5*sqrt(3)",
    ],
    r"5\sqrt{3} \text{ cm}": [r"5\sqrt{3}", r"5\sqrt{3} cm"],
    r"\frac { 2 \sqrt { 2 } } { 5 }": [r"\dfrac{2\sqrt{2}}{5}", r"0.4\sqrt2"],
    r"\frac { 8 } { \sqrt 3 } \pi": [r"\frac{8\sqrt{3}\pi}{3}", "14.51"],
    r"52 + 4 \sqrt { 3 } + 4 \sqrt { 6 }": [r"4(13+\sqrt{3}+\sqrt{6})"],
    "(2, 4)": [
        "(2,4)", r"\left(2, 4\right)", "2, 4", "(2.0, 4.0)", "(x, y) = (2, 4)", "A'(2, 4)",
        r"\langle 2, 4\rangle", "x=2, y=4",
    ],
    "(-5, 5)": [r"\begin{pmatrix} -5 \\ 5 \end{pmatrix}"],
    "[3, 2, 3, 3, 6]": ["[3,2,3,3,6]", "(3,2,3,3,6)", "3, 2, 3, 3, 6"],
    r"\{1, 2\}": [r"\{2,1\}", "1, 2"],
    "1, 2": ["2, 1", r"1 \text{ and } 2", "x=1, x=2", r"x = 1 \text{ or } x = 2"],
    "-5, 5": [r"\pm 5"],
    r"\pm 5": ["5, -5"],
    "A, C": ["A,C", "(C), (A)", "C and A"],
    "y = 4": ["y=4", "4", "y=4.0"],
    "y = 2x+1": ["y=1+2x", "2x+1"],
    "2x+3": ["3+2x"],
    "x^2-1": ["(x-1)(x+1)"],
    r"2\pi r": ["2πr"],
    r"x \geq 3": [r"x\ge 3", r"3 \leq x", "x ≥ 3"],
    r"(-\infty, 2) \cup (3, \infty)": [r"(-\infty,2)\cup(3,\infty)"],
    "Sep": ["September", "Sept."],
    "White": ["white", r"\text{White}", "White."],
    "BS": [r"\text{BS}", "bs"],
    "Yes": ["yes", r"\text{yes}."],
    "right-angled": ["right angled", "Right-Angled"],
    "80-90": ["80 - 90", "80–90"],  # noqa: RUF001
    "3:4": ["3 : 4"],
    "+": ["+"],
}  # fmt: skip

DIFFERENT: dict[str, list[str]] = {
    "B": [
        "A", "(A)", "A or B", "A, B", "(A)(B)", "(A) or (B)", "B) or C)", "A: 5, B: 6", "B or C",
        "B, C", "AB", "not B", "both", "12", "",
    ],
    "A": ["A circle", "a circle", "True"],
    "80": [
        "81", "80.1", "8", "800", "-80", "80 or 81", "80, 81", r"\pm 80", "x > 80", "2x = 80",
        "x = 80 or x = 3", "80x", "80-90", "80/90", "80:90", "80 million", "80 hundred", r"80\pi",
        "80!", "80^2", "x^2 = 80", "80 + x", "80i", "80abc", "80 not 81", "80 80", "80.80.80",
        "80; 81", r"\boxed{80} \boxed{80}", "between 70 and 80", r"70 < x < 80", "8 0", "--80",
    ],
    "3": ["x = 9 or x = 3", "x=9,y=3", "3,1", r"\frac{3}{0}"],
    "5 cm": ["5 m", "5 cm^2", "6 cm"],
    "100130": ["100131"],
    "12345678901234567890": ["12345678901234567891"],
    "0.4": ["0.41", r"0.4\pi", "0,4"],
    "0.0005": ["0.001"],
    "0": ["0.0005", "x", "none", "", "False"],
    "2.0944": ["2.1", "-2.0944"],
    r"5 \sqrt { 3 }": [
        r"5\sqrt{2}", "8.67", "5", "53", r"3\sqrt{5}", r"5\sqrt{3} or 6", r"2x = 5\sqrt{3}",
        r"5\sqrt{3} x",
    ],
    "25%": ["26", "2.5", "0.26"],
    "1 1/2": ["11/2"],
    "11/2": ["1 1/2"],
    "2m": ["2", "2n"],
    r"2\pi h": ["6.2832", r"2\pi m", r"2\pi"],
    "(2, 4)": ["(4, 2)", "(2, 5)", "[2, 4]", r"\{2, 4\}", "24", "2", "(2, 4, 0)", "(2,4),(4,2)"],
    "[1, 2)": ["(1, 2)", "[1, 2]"],
    "[3, 2, 3, 3, 6]": ["[3, 2, 3, 6, 3]", "32336"],
    "1, 2": ["1", "1, 3", "1, 1", "12"],
    "1, 1": ["1, 2"],
    "1,2": ["12"],
    "x+1": ["2y = x+1", "y > x+1"],
    r"\pm 5": ["5"],
    "A, C": ["A", "A, B"],
    "y = 4": ["x = 4", "y = 5", "5", "y > 4"],
    "x = 0": ["y = 0", "x=0 or x=1", "y-axis"],
    "2x+3": ["2x", "x=1"],
    "BS": ["SB", "B", "BSx"],
    "White": ["not white", "White or black", "whit"],
    "Mar": ["May", "Mark"],
    "Yes": ["No", "yes and no"],
    "Product C": ["C", "Product A"],
    "80-90": ["70-80", "-10"],
    "3:4": ["4:3", "7", "6:9"],
    r"x \geq 3": ["x > 3", r"x \leq 3", "3"],
    r"\triangle ABC": [r"\triangle ACB"],
    r"\infty": [r"-\infty"],
    "+": ["-"],
    "C++": ["C"],
    "version 1.2": ["version 12"],
    "": ["", "5"],
}  # fmt: skip


@pytest.mark.parametrize("gold", SAME)
def test_an_answer_written_otherwise_is_the_same(gold: str) -> None:
    assert [answer for answer in [gold, *SAME[gold]] if not same_answer(answer, gold)] == []


@pytest.mark.parametrize("gold", DIFFERENT)
def test_another_answer_is_not_the_same(gold: str) -> None:
    assert [answer for answer in DIFFERENT[gold] if same_answer(answer, gold)] == []


@pytest.mark.parametrize(
    ("gold", "within", "beyond"),
    [
        (2.5, 2.501, 2.5011),  # 0.001 where 1e-4 of the answer is less
        (250.5, 250.525, 250.526),  # 1e-4 of the answer
        (0.02, 0.0202, 0.0203),  # never above 1 % of it
        (250000, 250000.001, 250000.002),  # an integer: 0.001 only
        (0, 1e-9, 1e-8),
    ],
)
def test_the_tolerance_is_a_thousandth_or_a_ten_thousandth_part(
    gold: float, within: float, beyond: float
) -> None:
    assert close(within * (1 - 1e-9), gold)
    assert not close(beyond, gold)
    assert close(-within * (1 - 1e-9), -gold)
    assert not close(-beyond, -gold)


def test_no_answer_is_evaluated_as_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sympy_parser = importlib.import_module("sympy.parsing.sympy_parser")
    evaluated: list[str] = []
    evaluate = sympy_parser.eval_expr

    def record(code: str, *scopes: dict[str, object]) -> object:
        evaluated.append(code)
        return evaluate(code, *scopes)

    monkeypatch.setattr(sympy_parser, "eval_expr", record)
    trace = tmp_path / "trace"
    attack = f"__import__('os').mkdir('{trace}')"
    for text in (attack, f"1+{attack}", f"[{attack}, 2]", f"\\frac{{{attack}}}{{2}}", "2*3+1"):
        _parsed.cache_clear()
        for gold in ("7", "x+1", r"5\sqrt{3}", "(1, 2)", attack):
            same_answer(text, gold)
            same_answer(gold, text)
    assert not trace.exists()
    # sympy reads numerals ("Integer (2 )") in this way, and names of its own; nothing else.
    assert [code for code in evaluated if re.search(r"mkdir|import|[*+]", code)] == []
    assert "Integer (2 )" in evaluated


def real_answers() -> list[str]:
    parquet = pytest.importorskip("pyarrow.parquet")
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}")
    answers: list[str] = []
    for folder in FOLDERS:
        for file in sorted((DATA / folder / "data").glob("*.parquet")):
            answers += parquet.read_table(file, columns=["answer"])["answer"].to_pylist()
    lines = (DATA / "geometry3k-mini" / "text_only_answers.jsonl").read_text().splitlines()
    for line in lines:
        answers += [json.loads(line)["answer"], *json.loads(line)["choices"]]
    assert len(answers) > 800
    return sorted(set(answers))


def test_every_real_gold_answer_is_right_for_itself_and_wrong_for_the_others() -> None:
    answers = real_answers()
    assert [gold for gold in answers if accuracy(boxed(gold), gold) != 1.0] == []

    def plainly(answer: str) -> object:
        """The number, the assigned number, or the text itself: an oracle for these answers."""
        value = answer.removeprefix("x = ").removeprefix("y = ")
        try:
            return float(value)
        except ValueError:
            return answer

    wrong = [
        (answer, gold)
        for gold in answers
        for answer in answers
        if same_answer(answer, gold) != (plainly(answer) == plainly(gold))
    ]
    assert wrong == []


# --- Any text at all -----------------------------------------------------------------------------

MARKS = (
    r"\boxed{ } { ( ) [ ] , ; = < > + - * / | _ . : % $ ° ' & \\ \{ \} \frac \sqrt \text{ \pi \pm"
    r" \left( \right) \begin{pmatrix} \end{pmatrix} \approx \leq \cup \infty \sin \log \int \sum"
    r" <think> </think> 0 1 2 3 12 1,234 .5 1e3 A B (C) x y i e AB or and not cm m/s million"
)
FRAGMENTS = st.sampled_from(MARKS.split())
ANSWERS = st.one_of(
    st.text(max_size=30),
    st.lists(FRAGMENTS, max_size=12).map("".join),
    st.lists(FRAGMENTS, max_size=12).map(" ".join),
)
RESPONSES = st.one_of(ANSWERS, ANSWERS.map(boxed))


@pytest.fixture(scope="module")
def default_grader() -> Iterator[Grader]:
    with Grader("default", timeout_seconds=20.0) as grader:
        yield grader


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(RESPONSES, ANSWERS, st.just("")), min_size=1, max_size=10))
def test_whatever_a_model_writes_earns_between_nothing_and_one(
    default_grader: Grader, items: list[tuple[str, str, str]]
) -> None:
    for reward in default_grader.grade(items):
        assert 0.0 <= reward.total <= 1.0
        assert reward.accuracy in (0.0, 1.0)
        assert reward.format in (0.0, 1.0)
    assert default_grader.failures == Counter()


@settings(max_examples=300, deadline=None)
@given(RESPONSES)
def test_any_response_has_a_canonical_answer_that_is_its_own(response: str) -> None:
    answer = extract_answer(response)
    assert answer == extract_answer(response)
    assert well_formed(response) in (True, False)
    assert answer == "" or final_answer(response) is not None


@pytest.mark.parametrize(
    "unit", [r"\boxed{", "{", "}", "((", "[1,", "1,", " ", '"', "a-", r"\text{"]
)
def test_reading_an_answer_takes_linear_time(unit: str) -> None:
    began = time.monotonic()
    extract_answer(boxed(unit * (100_000 // len(unit))))
    extract_answer(unit * (100_000 // len(unit)))
    extract_answer(boxed(unit * 900 + "2" + "]" * 900))
    assert time.monotonic() - began < 2.0


# --- Finding a reward function -------------------------------------------------------------------

Write = Callable[[str], str]


@pytest.fixture
def module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Write:
    """Writes a module into the working directory; returns its name."""
    name = f"module_{abs(hash(request.node.nodeid))}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str) -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


def test_a_spec_names_the_default_or_a_function_of_a_module_beside_you(module: Write) -> None:
    assert resolve("default") is default_reward
    name = module(
        """
        def shout(response, answer, question):
            return 0.25

        class Judge:
            strict = staticmethod(lambda response, answer, question: 0.75)
        """
    )
    assert resolve(f"{name}:shout")("", "", "") == 0.25
    assert resolve(f"{name}:Judge.strict")("", "", "") == 0.75


SOURCE = """
number = 5
def two(response, answer): return 0.0
def three(response, answer, question): return 0.0
"""


@pytest.mark.parametrize(
    ("spec", "source", "complaint"),
    [
        ("accuracy", "", "'accuracy' names no function; expected 'default' or 'package.module:"),
        ("a b:c", "", "names no function"),
        ("{}:", "", "names no function"),
        ("no_such_module_1:f", "", "no module named 'no_such_module_1' in "),
        ("{}.inner:f", "", "no module named"),
        ("{}:four", SOURCE, "has no 'four'; it has number, three, two"),
        ("{}:number", SOURCE, "is a int, not a function"),
        ("{}:two", SOURCE, r"has the signature \(response, answer\), but is called with three"),
        ("{}:three", "import no_such_module_2", "was found, but it imports 'no_such_module_2'"),
        ("{}:three", "1 / 0", "failed with ZeroDivisionError: division by zero"),
        ("{}:three", "raise SystemExit(4)", "failed with SystemExit: 4"),
        ("{}:three", "def :", "failed with SyntaxError"),
    ],
)
def test_a_spec_that_names_no_reward_function_is_refused_with_the_reason(
    module: Write, spec: str, source: str, complaint: str
) -> None:
    spec = spec.format(module(source))
    with pytest.raises(ValueError, match=complaint):
        resolve(spec)
    with pytest.raises(ValueError, match=complaint):
        Grader(spec, workers=1)


def test_a_module_that_ends_its_process_cannot_start_a_grader(module: Write) -> None:
    name = module("import os; os._exit(9)")
    with pytest.raises(RuntimeError, match=r"could not start, 3 times in a row: exit code 9"):
        Grader(f"{name}:f", workers=1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"timeout_seconds": 0.0}, "timeout_seconds is 0.0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds is nan"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds is inf"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_a_grader_needs_a_limit_and_a_worker(arguments: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Grader("default", **arguments)  # type: ignore[arg-type]


# --- The grader ----------------------------------------------------------------------------------


def test_the_grader_gives_what_the_function_gives_in_order(default_grader: Grader) -> None:
    items = [
        (boxed("5"), "5", "q"),
        (r"\boxed{5}", "5", "q"),
        (boxed(r"\sqrt{75}"), r"5 \sqrt { 3 }", "q"),
        (boxed("6"), "5", "q"),
        ("\udc80 no text \0 at all", "5", "q"),
        (boxed("5"), "5", "q"),
    ] * 3
    assert default_grader.grade(items) == [default_reward(*item) for item in items]
    assert default_grader.grade([]) == []


def test_two_thousand_short_responses_are_graded_in_seconds(default_grader: Grader) -> None:
    items = [(boxed(f"{number}.5 cm"), f"{number % 7}.5", "q") for number in range(2000)]
    began = time.monotonic()
    rewards = default_grader.grade(items)
    assert time.monotonic() - began < 5.0  # 0.3 on an idle machine
    assert sum(reward.accuracy for reward in rewards) == 7


@pytest.mark.parametrize(
    "item", [("a", "b"), ("a", "b", 3), ("a", None, "c"), ("a", "b", "c", None), ("a",) * 5]
)
def test_an_item_that_is_not_three_strings_or_four_is_refused(
    default_grader: Grader, item: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="expected three strings"):
        default_grader.grade([item])


HAZARDS = r"""
import ctypes, os, re, signal, sys, threading, time
import numpy
from cppo.reward import Reward

def hog():
    blocks = []
    while True:
        blocks.append(bytearray(10**8))

def deaf():
    for number in range(1, 65):
        try:
            signal.signal(number, lambda *_: None)
        except (OSError, ValueError):
            pass
    while True:
        try:
            time.sleep(1000)
        except BaseException:  # deaf to whatever ends a program: that is what it is for
            pass

def fork():
    os.fork()  # the child answers too
    return 0.5

def shout():
    print("printed " * 100_000)
    os.write(1, b"written " * 100)
    return 0.5

def alarm():
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(1)
    return 0.5

def babble():
    for descriptor in range(3, 1000):
        try:
            os.write(descriptor, b'{"total": 1.0}\n')
        except OSError:
            pass
    return 1.0

def thread():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return 0.5

class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")

HAZARDS = {
    "sleep": lambda: time.sleep(1000),
    "loop": lambda: [None for _ in iter(int, 1)],
    "regular expression": lambda: re.match(r"(a|aa)+$", "a" * 80 + "b"),
    "power": lambda: 10 ** 10 ** 8,
    "deaf": deaf,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hog": hog,
    "exit": lambda: sys.exit(0),
    "_exit": lambda: os._exit(0),
    "segmentation fault": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "babble": babble,
    "thread": thread,
    "close": lambda: os.closerange(3, 1000),
    "raise": lambda: {}["missing"],
    "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    "recursion": lambda: (lambda f: f(f))(lambda f: f(f)),
    "text": lambda: "x",
    "none": lambda: None,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "huge": lambda: 10**400,
    "not finite": lambda: Reward(total=float("nan"), accuracy=0.0, format=0.0),
    "not in range": lambda: Reward(total=0.0, accuracy=2.0, format=0.0),
    "no second share": lambda: Reward(total=0.0, accuracy=0.0, format=0.0, second_look=1.5),
    "unprintable": Unprintable,
    "fork": fork,
    "shout": shout,
    "alarm": alarm,
    "half": lambda: 0.5,
    "true": lambda: True,
    "numpy true": lambda: numpy.bool_(True),
    "numpy": lambda: numpy.float32(0.5),
    "minus": lambda: -3,
    "reward": lambda: Reward(total=-2.0, accuracy=0.5, format=1.0),
}

def hazard(response, answer, question):
    return HAZARDS[answer]()
"""

FAILURES = {
    "timeout": ["sleep", "loop", "regular expression", "power", "deaf", "stop"],
    "died": ["_exit", "segmentation fault", "kill", "close", "babble"],
    "exception: MemoryError": ["hog"],
    "exception: SystemExit": ["exit"],
    "exception: KeyError": ["raise"],
    "exception: KeyboardInterrupt": ["interrupt"],
    "exception: RecursionError": ["recursion"],
    "exception: RuntimeError": ["unprintable"],
    "not a number": ["text", "none", "nan", "infinity", "huge", "not finite"],
    "out of range": ["not in range", "no second share"],
}
HALF = Reward(total=0.5, accuracy=0.5, format=0.0)
ONE = Reward(total=1.0, accuracy=1.0, format=0.0)
REWARDS = {
    "half": HALF,
    "fork": HALF,
    "shout": HALF,
    "thread": HALF,
    "alarm": HALF,
    "numpy": HALF,
    "true": ONE,
    "numpy true": ONE,
    "minus": Reward(total=-3.0, accuracy=0.0, format=0.0),
    "reward": Reward(total=-2.0, accuracy=0.5, format=1.0),
}


def test_whatever_a_function_does_it_scores_zero_is_counted_and_the_rest_goes_on(
    module: Write, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    name = module(HAZARDS)
    hazards = [hazard for group in FAILURES.values() for hazard in group]
    items, expected = [], []
    for hazard in hazards:
        items += [("r", hazard, "q"), (f"after {hazard}", "half", "q")]
        expected += [ZERO, HALF]
    for kind, reward in REWARDS.items():
        items += [("r", kind, "q"), (f"after {kind}", "half", "q")]
        expected += [reward, HALF]
    with (
        caplog.at_level(logging.WARNING, "cppo.reward"),
        Grader(f"{name}:hazard", timeout_seconds=2.0, memory_bytes=2**29) as grader,
    ):
        assert grader.grade(items) == expected
        assert grader.failures == {reason: len(group) for reason, group in FAILURES.items()}
        logged = [record.getMessage() for record in caplog.records]
        assert len(logged) == len(FAILURES)  # one for each reason, not for each failure
        assert any("KeyError: 'missing'" in message for message in logged)
        assert any("no reward after 2 seconds" in message for message in logged)
        assert any("returned 'x' (str); expected a finite float" in each for each in logged)
        time.sleep(1.2)  # past the alarm that one of them left behind
        assert grader.grade([("later", "half", "q")]) == [HALF]
    assert capfd.readouterr().out == ""


def test_the_limit_is_on_each_call(module: Write) -> None:
    name = module(HAZARDS)
    with Grader(f"{name}:hazard", timeout_seconds=0.5, workers=2) as grader:
        began = time.monotonic()
        assert grader.grade([("r", "sleep", "q"), ("r", "loop", "q")]) == [ZERO, ZERO]
        assert 0.5 <= time.monotonic() - began < 1.4
        assert grader.grade([("r", "sleep", "q"), ("r", "half", "q")]) == [ZERO, HALF]
        assert grader.failures == {"timeout": 3}


def test_a_reply_is_a_fourth_argument_and_under_the_same_limit(module: Write) -> None:
    name = module(
        """
        import time
        def f(response, answer, question, reply="none"):
            time.sleep(1000 if reply == "hang" else 0)
            return {"none": 0.5, "some": 1.0}[reply]
        """
    )
    items = [("r", "a", "q", "some"), ("r", "a", "q", "hang"), ("r", "a", "q")]
    with Grader(f"{name}:f", timeout_seconds=0.5, workers=1) as grader:
        assert grader.grade(items) == [ONE, ZERO, HALF]
        assert grader.failures == {"timeout": 1}


def test_a_slow_start_does_not_count_into_the_limit(module: Write) -> None:
    name = module(
        """
        import time
        time.sleep(1.0)
        def f(response, answer, question):
            time.sleep(1000 if answer == "hang" else 0)
            return 1.0
        """
    )
    with Grader(f"{name}:f", timeout_seconds=0.5, workers=1) as grader:
        items = [("r", "hang", "q"), ("r", "go", "q")]
        assert grader.grade(items) == [ZERO, ONE]
        assert grader.failures == {"timeout": 1}


def test_identical_items_are_graded_once(module: Write, tmp_path: Path) -> None:
    name = module(
        """
        def f(response, answer, question):
            with open("calls", "a") as file:
                file.write(response + answer + question + "\\n")
            return float(answer)
        """
    )
    items = [("r", "1", "q"), ("r", "0", "q"), ("r", "1", "q"), ("r", "1", "other")]
    with Grader(f"{name}:f") as grader:
        assert [reward.total for reward in grader.grade(items)] == [1.0, 0.0, 1.0, 1.0]
        assert sorted((tmp_path / "calls").read_text().split()) == ["r0q", "r1other", "r1q"]


def test_a_function_that_forks_leaves_one_process_to_answer(module: Write) -> None:
    name = module(
        """
        import os
        def f(response, answer, question):
            if answer == "0":
                os.fork()
            return float(os.getpid())
        """
    )
    with Grader(f"{name}:f", workers=1) as grader:
        rewards = grader.grade([("r", str(number), "q") for number in range(30)])
        assert {reward.total for reward in rewards} == set(map(float, worker_pids(grader)))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Those of the processes that are still alive after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(alive, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@needs_proc
def test_what_a_late_call_started_ends_with_it(module: Write, tmp_path: Path) -> None:
    name = module(
        """
        import subprocess, time
        def f(response, answer, question):
            with open("child", "w") as file:
                file.write(str(subprocess.Popen(["sleep", "1000"]).pid))
            time.sleep(1000)
        """
    )
    with Grader(f"{name}:f", timeout_seconds=2.0, workers=1) as grader:
        assert grader.grade([("r", "a", "q")]) == [ZERO]
    assert wait_until_gone([int((tmp_path / "child").read_text())], 5.0) == []


def worker_pids(grader: Grader) -> list[int]:
    return [worker.process.pid for worker in grader._workers]


@needs_proc
def test_closing_ends_the_workers_and_the_grader() -> None:
    grader = Grader("default")
    pids = worker_pids(grader)
    assert all(map(alive, pids))
    grader.close()
    grader.close()
    assert wait_until_gone(pids, 5.0) == []
    with pytest.raises(ValueError, match="closed"):
        grader.grade([("r", "a", "q")])


def test_a_worker_lost_between_calls_is_replaced(module: Write) -> None:
    name = module("def f(response, answer, question): return 1.0")
    with Grader(f"{name}:f", workers=1) as grader:
        os.kill(worker_pids(grader)[0], signal.SIGKILL)
        time.sleep(0.2)
        rewards = grader.grade([("r", str(number), "q") for number in range(3)])
        assert rewards == [ONE] * 3
        assert grader.failures == Counter()


def test_workers_ignore_control_c(module: Write) -> None:
    name = module("def f(response, answer, question): return 1.0")
    with Grader(f"{name}:f") as grader:
        pids = worker_pids(grader)
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        assert grader.grade([("r", "a", "q"), ("r", "b", "q")]) == [ONE, ONE]
        assert worker_pids(grader) == pids


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, even where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_grader_that_was_interrupted_grades_the_next_items_afresh(module: Write) -> None:
    name = module(
        """
        import time
        def f(response, answer, question):
            time.sleep(float(answer))
            return 1.0 if question == "second" else 0.0
        """
    )
    with Grader(f"{name}:f", timeout_seconds=100.0) as grader:
        interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            grader.grade([("r", "90", "first"), ("s", "90", "first")])
        interrupt.join()
        assert grader.grade([("r", "0", "second"), ("s", "0", "second")]) == [ONE, ONE]
        assert grader.failures == Counter()


@needs_proc
def test_workers_end_when_their_parent_is_killed(module: Write) -> None:
    name = module(
        """
        import signal, threading, time
        def f(response, answer, question):
            if answer == "ignore":
                time.sleep(0.3)
                threading.Thread(target=time.sleep, args=(1000,)).start()
                signal.signal(signal.SIGALRM, signal.SIG_IGN)
                return 0.0
            while True:
                pass
        """
    )
    script = (
        "import threading\n"
        "from cppo.reward import Grader\n"
        f"grader = Grader('{name}:f', timeout_seconds=1.0)\n"
        "grader.grade([('r', 'ignore', 'q'), ('s', 'ignore', 'q')])\n"
        "pids = [worker.process.pid for worker in grader._workers]\n"
        "threading.Timer(0.3, lambda: print(*pids, flush=True)).start()\n"
        "grader.grade([('r', 'hang', 'q')])\n"  # one worker is busy, the other idle
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    left = wait_until_gone(pids, 10.0)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(pids) == 2
    assert left == []


def test_a_worker_imports_neither_torch_nor_the_main_module(module: Write, tmp_path: Path) -> None:
    name = module(
        "import sys\ndef f(response, answer, question): return float('torch' in sys.modules)"
    )
    script = tmp_path / "train.py"  # without `if __name__ == "__main__"`
    script.write_text(
        "import sys, types\n"
        "print('main')\n"
        "import cppo.reward, cppo.evaluation\n"
        "assert 'torch' not in sys.modules\n"
        f"with cppo.reward.Grader('{name}:f') as grader:\n"
        "    print(grader.grade([('r', 'a', 'q')])[0].total)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=True
    )
    assert run.stdout.split() == ["main", "0.0"]


def test_threads_may_share_a_grader(module: Write) -> None:
    name = module("def f(response, answer, question): return float(answer)")
    with Grader(f"{name}:f") as grader:
        results: dict[int, list[Reward]] = {}

        def work(number: int) -> None:
            items = [("r", str(number), str(question)) for question in range(50)]
            results[number] = grader.grade(items)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in range(4):
            assert [reward.total for reward in results[number]] == [float(number)] * 50

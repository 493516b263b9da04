"""Reading a response's final answer, and deciding whether it is the gold answer.

Pure functions. No answer is evaluated as Python: numbers are read here, and of math-verify only the
LaTeX reader serves, which hands sympy single numerals; it is imported on first use.

What counts as the same answer is decided by the gold answer's kind:

option letter   one of A to H: ``B``, ``(B)``, ``B.``, ``b``, ``option B``, ``B) 12`` all name B.
number          a literal with optional sign, thousands separators, fraction, power of ten, percent
                sign, currency or unit; the prediction may be any expression with a real value.
                See `close` for the tolerance. A percent sign on one side only is read either way.
                Units are compared only where both sides give one that is known.
list            ``(2, 4)`` and ``[3, 2, 3]`` in order, ``\\{1, 2\\}`` and ``1, 2`` in any order.
expression      LaTeX, compared by math-verify; one with a real value is compared as a number.
text            everything else: equal up to case, spacing, punctuation and month abbreviations.

An assignment such as ``x = 5`` names its right side. A prediction that offers several answers
(``5 or 6``) is wrong unless the gold answer lists them all.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

# A final answer is short; longer ones are compared as text only, which bounds the time they take.
MAX_ANSWER_CHARACTERS = 1000

# --- Reading the final answer --------------------------------------------------------------------

_BOX_TOKEN = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_WELL_FORMED = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)


def _boxes(text: str) -> list[str]:
    """Contents of every balanced ``\\boxed{...}``, in the order in which they open. Linear time."""
    opened: list[tuple[int, bool]] = []  # where the content starts, whether a box opened it
    closed: list[tuple[int, str]] = []
    for token in _BOX_TOKEN.finditer(text):
        if token["box"] or token[0] == "{":
            opened.append((token.end(), bool(token["box"])))
        elif token[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                closed.append((start, text[start : token.start()]))
    return [content for _, content in sorted(closed)]


def final_answer(response: str) -> str | None:
    """What stands in the last balanced ``\\boxed{...}``; None where there is none.

    Where the response closes a thought (``</think>``), only what follows the last one counts.
    """
    boxes = _boxes(response.rpartition("</think>")[2])
    return boxes[-1] if boxes else None


def well_formed(response: str) -> bool:
    """Whether the response is ``<think>thought</think> answer`` and nothing else.

    The thought is not blank, each tag stands exactly once, and the answer has exactly one
    ``\\boxed{...}``, balanced and not blank. The thought may contain boxes of its own.
    """
    match = _WELL_FORMED.fullmatch(response)
    if match is None or response.count("<think>") != 1 or response.count("</think>") != 1:
        return False
    boxes = _boxes(match["answer"])
    return (
        bool(match["thought"].strip())
        and match["answer"].count("\\boxed") == 1
        and len(boxes) == 1
        and bool(boxes[0].strip())
    )


def extract_answer(response: str, final: Callable[[str], str | None] = final_answer) -> str:
    """The final answer, as `final` reads it, in a canonical form to vote on; ``""`` where there is
    none.

    Equal strings mean the same answer for what needs no algebra: ``(b)`` and ``B.`` give ``B``;
    ``1/2`` and ``0.50 cm`` give ``0.5`` (ten significant digits); texts are casefolded.
    """
    answer = _clean(final(response) or "")
    return _canonical(_assigned(answer) or answer)


def _canonical(answer: str) -> str:
    if letter := _option_letter(answer):
        return letter
    if quantity := _quantity(answer):
        return f"{float(quantity.value):.10g}" + "%" * quantity.percent
    if listed := _listed(answer):
        return listed.opening + ",".join(map(_canonical, listed.items)) + listed.closing
    return _key(answer)


# --- One spelling for what is written in many ways -----------------------------------------------

# The left sides look like the right ones: that is why they are here.
_SPELLINGS = {
    "−": "-", "–": "-", "—": "-", "’": "'", "‘": "'", "“": '"', "”": '"', "％": "%",  # noqa: RUF001
    "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",  # noqa: RUF001
    "≤": r"\leq ", "≥": r"\geq ", "±": r"\pm ", "∪": r"\cup ", "≈": r"\approx ",  # noqa: RUF001
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "∠": r"\angle ",
    "²": "^2", "³": "^3",
}  # fmt: skip
_SPELLING = re.compile("|".join(map(re.escape, _SPELLINGS)))
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"√\s*\(", r"sqrt("),
        (r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (r"\\\$|\$|(?<!\\)\\[()\[\]]", ""),  # currency and mathematics delimiters
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\s+", " "),
        (r"\{,\}", ","),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:le|leqslant)(?![A-Za-z])", r"\\leq"),
        (r"\\(?:ge|geqslant)(?![A-Za-z])", r"\\geq"),
        (r"\\%", "%"),
        (r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])", "°"),
    ]
]
_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|boldsymbol|bm"
    r"|operatorname\*?|boxed|fbox)\s*\{([^{}]*)\}"
)


@lru_cache(maxsize=4096)  # a gold answer meets every response of its group
def _clean(text: str) -> str:
    """The answer without fonts, delimiters, spacing commands and closing punctuation."""
    text = text[: 4 * MAX_ANSWER_CHARACTERS]
    text = _SPELLING.sub(lambda match: _SPELLINGS[match[0]], text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    unwrapped = 1
    while unwrapped:  # innermost first; each round removes at least one pair of braces
        text, unwrapped = _FONT.subn(r" \1 ", text)
    while (boxes := _boxes(text)) and text.strip().startswith(r"\boxed"):
        text = boxes[0]  # a gold answer may come in its box, as ViRL39K's do
    text = re.sub(r"\s+", " ", text).strip(" \t\n")
    if len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2]
    return text.rstrip(".,;: ") or text


_LONG_MONTH = re.compile(
    r"\b(?:january|february|march|april|june|july|august|sept(?:ember)?|october|november|december)\b"
)


@lru_cache(maxsize=4096)
def _key(answer: str) -> str:
    """What two answers share when they differ in case, spacing and punctuation only."""
    if _is_expression(answer):
        # A space between digits stays: "1 1/2" is not "11/2".
        return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer)
    words = re.sub(r"[\"`!?;,]|(?<!\d)\.|\.(?!\d)", " ", answer.casefold())
    words = re.sub(r"(?<=[^\W\d_])[-_](?=[^\W\d_])", " ", words)
    words = " ".join(words.split())
    words = re.sub(r" ?([^\w\s.']) ?", r"\1", words)  # "3 : 4" is "3:4"
    return _LONG_MONTH.sub(lambda month: month[0][:3], words) or answer


_RANGE_OR_RATIO = re.compile(r"[\d.,]+ ?(?:[-:] ?[\d.,]+ ?)+")
_NAMES_OF_THINGS = re.compile(
    r"\\(?:angle|triangle|overline|overrightarrow|widehat|odot|parallel|perp|sim|cong|square)\b"
)
_PLAIN_WORD = re.compile(r"(?<![A-Za-z\\])(?!(?:sqrt|sinh|cosh|tanh|sinx|cosx)\b)[A-Za-z]{4,}")


def _is_expression(answer: str) -> bool:
    """Whether math-verify may read it: algebra, and not words, ranges or names of figures.

    math-verify reads ``BS`` as a product, equal to ``SB``, and ``80-90`` as -10.
    """
    if _RANGE_OR_RATIO.fullmatch(answer) or _NAMES_OF_THINGS.search(answer):
        return False
    if re.search(r"\\[A-Za-z]+|[\^=<>+*/!|]|sqrt|\d ?- ?\d|(?<![A-Za-z])[a-z] ?-", answer):
        return _PLAIN_WORD.search(answer) is None
    return re.fullmatch(r"[-+]? ?[\d.]+ ?(?:[a-z]{1,3}|\(.*\))|[-+] ?[a-z]", answer) is not None


# --- Option letters ------------------------------------------------------------------------------

_LEAD = r"(?:(?:the )?(?:correct |final )?(?:option|choice|answer)(?: is)? ?:? ?)?"
_LETTER_ALONE = re.compile(rf"(?i:{_LEAD})[(\[{{]? ?([A-Ha-h]) ?[)\]}}]?[.:]?")
_LETTER_AND_TEXT = re.compile(
    rf"(?i:{_LEAD})(?:\( ?([A-Ha-h]) ?\)[.:]?|([A-H])(?: ?[).:]| (?=\())) ?(.+)"
)
_MORE_LETTERS = re.compile(r"\( ?[A-Ha-h] ?\)|\b[A-H] ?[).:]|(?:or|and|[,/&])(?![A-Za-z])")


def _option_letter(answer: str) -> str | None:
    """The one option that the answer names, as a capital; None where it names none or several.

    ``A circle`` names none: there the A is as likely an article.
    """
    if match := _LETTER_ALONE.fullmatch(answer):
        return match[1].upper()
    match = _LETTER_AND_TEXT.fullmatch(answer)
    if match is None:
        return None
    if _MORE_LETTERS.match(match[3]) or re.search(r"\( ?[A-H] ?\)|\b[A-H] ?[).:]", match[3]):
        return None
    return (match[1] or match[2]).upper()


def _gold_letter(gold: str) -> str | None:
    """The option letter, where the gold answer is one: ``B``, ``(B)`` or ``(B) 12``, not ``b``."""
    match = re.fullmatch(r"([A-H])|\( ?([A-H]) ?\)(?: .*)?|([A-H])\)(?: .*)?", gold)
    return match and (match[1] or match[2] or match[3])


# --- Numbers -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    value: Fraction  # as written: 25 for "25%"
    percent: bool
    unit: str  # canonical; "" where there is none or where it is only a noun ("3 apples")


_DIGITS = (
    r"(?:[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|[1-9]\d{0,2}(?: \d{3})+(?! ?\d)|\d{1,40})(?:\.\d{0,40})?"
    r"|\.\d{1,40}"
)
_SIGN_AND_CURRENCY = r"(?P<sign>[-+]?) ?[£€¥₹]? ?"
_TAIL = r"(?P<tail>(?:[^\d.,].*)?)"
_NUMBERS = [
    re.compile(_SIGN_AND_CURRENCY + number + _TAIL)
    for number in (
        rf"(?:(?P<whole>\d{{1,40}}) ?)?\\frac ?(?:{{(?P<top>-?(?:{_DIGITS}))}}|(?P<top_digit>\d)) ?"
        rf"(?:{{(?P<bottom>-?(?:{_DIGITS}))}}|(?P<bottom_digit>\d))",
        rf"(?:(?P<whole>\d{{1,40}}) )?(?P<top>{_DIGITS})/(?P<bottom>{_DIGITS})",
        rf"(?P<decimal>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\d)"
        r"|(?: ?(?:\\times|\\cdot|\*|x) ?10\^(?P<power>{[-+]?\d{1,3}}|[-+]?\d{1,3})(?!\d)))?",
    )
]
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_UNIT_NAMES = """
mm millimeter millimetre|cm centimeter centimetre|dm decimeter decimetre|m meter metre
km kilometer kilometre|in inch inches|ft foot feet|yd yard|mi mile|mg milligram|g gram
kg kilogram|lb pound lbs|oz ounce|ml mL milliliter millilitre|L l liter litre
ms millisecond|s sec second|min minute|h hr hour|day|week|month|year yr
° deg degree|rad radian|°C|°F|K kelvin|N newton|J joule|kJ kilojoule|W watt|kW kilowatt
V volt|A amp ampere|Ω ohm|Hz hertz|Pa pascal|kPa kilopascal|C coulomb|T tesla|mol mole
mph|dollar usd USD|cent|euro
"""
_UNITS = {
    alias: names.split()[0]
    for names in re.split(r"[|\n]", _UNIT_NAMES.strip())
    for alias in names.split()
}
_NOT_A_NOUN = re.compile(
    r"\b(?:or|and|to|by|not?|none|times|plus|minus|divided|over|pi|sqrt|root|sin|cos|tan|log|exp|mod"
    r"|hal(?:f|ves)|(?:third|fourth|quarter|fifth|tenth)s?|dozen|hundred|thousand|[mbtr]+illion"
    r"|squared|cubed|factorial|infinity|undefined|if)\b",
    re.IGNORECASE,
)


def _unit(tail: str) -> str | None:
    """The canonical unit behind a number, ``""`` for other nouns, None where it is neither."""
    text = re.sub(r"\b(?:sq\.?|square) ([A-Za-z]+)", r"\1^2", tail.strip(" ."))
    text = re.sub(r"\bcubic ([A-Za-z]+)", r"\1^3", text)
    text = re.sub(r"° ?([CF])\b", r"°\1", text)
    parts = []
    for part in re.split(r" ?/ ?| per | ?\\cdot ?| ?\* ?| ", text):
        match = re.fullmatch(r"([A-Za-zΩ]+|°[CF]?)(?: ?\^ ?\{? ?(-?\d) ?\}?)?", part)
        if match is None:
            return None
        name = match[1]
        spellings = (name, name.lower(), name.lower().removesuffix("s"))
        known = [each for each in spellings[: 3 if len(name) > 1 else 1] if each in _UNITS]
        if not known:
            break
        parts.append(_UNITS[known[0]] + (match[2] or ""))
    else:
        return "/".join(parts)
    noun = re.fullmatch(r" [A-Za-z]{3,}(?:\^\d)?(?:[ -][A-Za-z]{2,}){0,3}", f" {text}")
    spaced = tail.startswith(" ")  # "6 cats", not the product "6xyz"
    return "" if noun and spaced and not _NOT_A_NOUN.search(text) else None


def _fraction(digits: str) -> Fraction:
    return Fraction(re.sub(r"[ ,]", "", digits).removesuffix("."))


@lru_cache(maxsize=4096)
def _quantity(answer: str, *, gold: bool = False) -> _Quantity | None:
    """A number literal with its unit; None where the answer is anything else.

    In a gold answer ``2m`` is a product, ``2 m`` a length.
    """
    while match := re.fullmatch(r"\( ?([^(),]*) ?\)|\{ ?([^{},]*) ?\}", answer):
        answer = (match[1] or match[2] or "").strip()
    answer = re.sub(r"(?<=[{/^]) | (?=[}/^])", "", answer)
    match = next(filter(None, (number.fullmatch(answer) for number in _NUMBERS)), None)
    if match is None or (gold and re.fullmatch(r"[a-z]", match["tail"])):
        return None
    part = match.groupdict(default="")
    if "decimal" in part:
        exponent = part["exponent"] or part["power"].strip("{}") or "0"
        value = _fraction(part["decimal"]) * Fraction(10) ** int(exponent)
    else:
        bottom = _fraction(part["bottom"] or part.get("bottom_digit", ""))
        if bottom == 0:
            return None
        value = _fraction(part["whole"] or "0")
        value += _fraction(part["top"] or part.get("top_digit", "")) / bottom
    tail = part["tail"]
    if scale := re.match(r" ?(hundred|thousand|million|billion)\b", tail, re.IGNORECASE):
        value *= _SCALES[scale[1].lower()]
        tail = tail[scale.end() :]
    percent = re.fullmatch(r" ?(?:%|percent|per cent|pct)", tail, re.IGNORECASE) is not None
    unit = "" if percent or not tail.strip() else _unit(tail)
    if unit is None or abs(value) > sys.float_info.max:
        return None
    return _Quantity(value=-value if part["sign"] == "-" else value, percent=percent, unit=unit)


def close(predicted: Fraction | float, gold: Fraction | float) -> bool:
    """Whether two real numbers are the same answer.

    They may differ by 0.001 (as in DynaMath's scorer), but by no more than 1 % of the gold answer;
    where the gold answer is no integer, also by 1e-4 of it. An integer of any size is thus exact.
    """
    size = abs(float(gold))
    relative = 0.0 if Fraction(gold).denominator == 1 else 1e-4 * size
    return abs(Fraction(predicted) - Fraction(gold)) <= max(1e-9, relative, min(1e-3, 0.01 * size))


def _same_quantity(predicted: _Quantity, gold: _Quantity) -> bool:
    if predicted.unit and gold.unit and predicted.unit != gold.unit:
        return False
    if close(predicted.value, gold.value):
        return True
    if predicted.percent == gold.percent:
        return False
    return close(
        predicted.value / (100 if predicted.percent else 1),
        gold.value / (100 if gold.percent else 1),
    )


# --- Lists ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Listed:
    opening: str  # "(", "[", "{" or "" for a bare list
    items: tuple[str, ...]
    closing: str

    @property
    def ordered(self) -> bool:
        return self.opening in ("(", "[")


def _split(text: str) -> tuple[str, ...] | None:
    """Parts between commas outside brackets; None where brackets do not pair or nest deeply."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if not 0 <= depth <= 10:  # deeper is no answer, and lists are compared recursively
            return None
        if depth == 0 and character in ",;":
            parts.append(text[start:position].strip())
            start = position + 1
    return (*parts, text[start:].strip())


def _listed(answer: str) -> _Listed | None:
    """The items of a list of at least two; None where the answer is no list."""
    text = re.sub(r"\\langle ?", "(", re.sub(r" ?\\rangle", ")", answer))
    text = re.sub(r"\\([{}])", r"\1", text)
    text = re.sub(r"^[A-Z]'* ?(?=\()", "", text)  # a point: A'(2, 4)
    if column := re.fullmatch(r"\\begin\{([pb]matrix)\}([^&]*)\\end\{\1\}", text):
        text = "(" + column[2].replace(r"\\", ",") + ")"
    if len(text) > 2 and text[0] in "([{" and text[-1] in ")]}":
        items = _split(text[1:-1])
        if items is not None:
            return (
                _Listed(opening=text[0], items=items, closing=text[-1])
                if len(items) > 1 and all(items)
                else None
            )
    items = _split(re.sub(r",? (?:and|or) ", ", ", text))
    if items is None or len(items) < 2 or not all(items):
        return None
    readable = all(
        _quantity(item) or _is_expression(item) or re.fullmatch(r"[A-Za-z]|\(.*\)", item)
        for item in items
    )
    return _Listed(opening="", items=items, closing="") if readable else None


def _same_list(predicted: _Listed, gold: _Listed) -> bool:
    if len(predicted.items) != len(gold.items):
        return False
    if gold.ordered:
        # Two items in brackets may be an interval, where the kind of bracket matters.
        brackets_differ = predicted.opening + predicted.closing != gold.opening + gold.closing
        if predicted.opening == "{" or (
            len(gold.items) == 2 and predicted.opening and brackets_differ
        ):
            return False
        return all(map(_same, predicted.items, gold.items))
    left = list(predicted.items)
    for item in gold.items:
        match = next((other for other in left if _same(other, item)), None)
        if match is None:
            return False
        left.remove(match)
    return True


# --- Expressions ---------------------------------------------------------------------------------

_ASSIGNED_NAME = re.compile(
    r"(?!.*\\(?:sqrt|frac|pm)\b)(?!.*\b(?:or|and)\b)[A-Za-z\\△][A-Za-z0-9\\_{}'°△ ]*"
    r"(?:\( ?[A-Za-z0-9][A-Za-z0-9, ]*\))? ?|\( ?[A-Za-z] ?(?:, ?[A-Za-z] ?)+\) ?"
)
_EQUALS = re.compile(r" ?(?<![<>!\\])=(?!=) ?")
_SEVERAL = re.compile(r"[,;<>]|\\pm|\b(?:or|and)\b")
_RELATION = re.compile(r"[=<>]|\\(?:leq|geq|neq|lt|gt|approx)(?![A-Za-z])")


def _assigned(answer: str) -> str | None:
    """The value in ``x = value``, ``x = term = value``, ``value \\approx rounded``; else None.

    An approximation beside an exact value is left out: the exact one is the answer.
    """
    exact, approximately, rounded = answer.partition(r"\approx")
    if approximately:
        if _ASSIGNED_NAME.fullmatch(exact):
            return rounded.strip() if _RELATION.search(rounded) is None else None
        answer = exact.strip()
    name, *values = _EQUALS.split(answer)
    if not values:
        return answer if approximately else None
    if not _ASSIGNED_NAME.fullmatch(name) or any(map(_SEVERAL.search, values[:-1])):
        return None
    return values[-1].strip() or None


@lru_cache(maxsize=4096)
def _parsed(answer: str) -> Any | None:
    """The sympy object that math-verify reads; None where it reads none."""
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig

    # It warns that its own time limits are off. They are: they rest on signals, which neither stop
    # a loop in C nor work outside the main thread; `Grader` has one that holds.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Its unit list would also strip variables (t, h, ...): units are left to `_unit`.
    normalization = NormalizationConfig(
        basic_latex=True, malformed_operators=True, nits=True, units=False
    )
    # Only the LaTeX reader: the other one evaluates the answer as Python.
    targets = [LatexExtractionConfig(normalization_config=normalization)]
    text = answer.replace("°", "")
    found = parse(
        f"${text}$", extraction_config=targets, fallback_mode="no_fallback", parsing_timeout=None
    )
    return found[0] if found else None


@lru_cache(maxsize=4096)
def _value(answer: str, *, gold: bool = False) -> Fraction | None:
    """The real number that an expression stands for, to 15 digits; None where there is none.

    A unit behind it is dropped, but in a gold answer a single letter is a variable.
    """
    if (quantity := _quantity(answer, gold=gold)) is not None:
        return quantity.value / (100 if quantity.percent else 1)
    if not _is_expression(answer) or _RELATION.search(answer):
        return None
    match = re.fullmatch(r"(.*[\d})])( ?(?:°|([A-Za-z]+)(?:\^\d)?))", answer)
    if match and _unit(match[2]) is not None and not (gold and len(match[3] or "") == 1):
        answer = match[1]
    expression = _parsed(answer)
    try:
        if expression is None or not expression.is_number:
            return None
        number = float(expression.evalf(15))
    except (AttributeError, ArithmeticError, TypeError, ValueError, RecursionError):
        return None  # a set, a matrix, a complex number, an infinity: no real number
    return Fraction(number) if math.isfinite(number) else None


def _same_expression(predicted: str, gold: str) -> bool:
    from math_verify import verify

    if _RELATION.search(predicted) and not _RELATION.search(gold):
        return False  # math-verify would take the right side of "2x = 18"
    sides = _parsed(gold), _parsed(predicted)
    return None not in sides and bool(verify(*sides, timeout_seconds=None))


def _same(predicted: str, gold: str) -> bool:
    """`same_answer` for two cleaned answers."""
    if not predicted or not gold:
        return False
    if _key(predicted) == _key(gold):
        return True
    if (letter := _gold_letter(gold)) is not None:
        return _option_letter(predicted) == letter
    if len(predicted) > MAX_ANSWER_CHARACTERS or len(gold) > MAX_ANSWER_CHARACTERS:
        return False
    predicted_value, gold_value = _assigned(predicted), _assigned(gold)
    if predicted_value is not None and gold_value is None:
        return _same(predicted_value, gold)
    if gold_value is not None and predicted_value is None and not _RELATION.search(predicted):
        return _same(predicted, gold_value)
    if (quantity := _quantity(gold, gold=True)) is not None:
        if (other := _quantity(predicted)) is not None:
            return _same_quantity(other, quantity)
        value = _value(predicted)
        return value is not None and close(value, quantity.value)
    if (listed := _listed(gold)) is not None:
        others = _listed(predicted)
        if others is not None:
            return _same_list(others, listed)
        return (
            not listed.ordered and _is_expression(predicted) and _same_expression(predicted, gold)
        )
    if not _is_expression(gold):
        return False
    if (value := _value(gold, gold=True)) is not None:
        predicted_number = _value(predicted)
        return predicted_number is not None and close(predicted_number, value)
    return _same_expression(predicted, gold)


def same_answer(predicted: str, gold: str) -> bool:
    """Whether a final answer (without its box) is the gold answer; see the top of this file."""
    return _same(_clean(predicted), _clean(gold))

"""The text cells of a row: question, gold answer and kind."""

from cppo.data.item import PLACEHOLDER, BadRow

_BOXED = "\\boxed{"


def read_question(value: object, image_count: int) -> str:
    """The question in a cell, as it stands, for a row with `image_count` images.

    BadRow where it is blank, no text, or has not exactly one placeholder for each image.
    """
    if value is not None and not isinstance(value, str):
        raise BadRow("wrong type", f"the question is {type(value).__name__}; it must be text")
    question = _encodable(value or "", "question")
    if not question.strip():
        raise BadRow("question empty", "the question is blank")
    placeholders = question.count(PLACEHOLDER)
    if placeholders != image_count:
        raise BadRow(
            "placeholder count",
            f"{placeholders} {PLACEHOLDER} in the question, {image_count} in the row's images: "
            f"write {PLACEHOLDER} once for each image, where it belongs",
        )
    return question


def read_answer(value: object) -> str:
    r"""The gold answer in a cell: text or a number, without blanks and one \boxed{} around it.

    BadRow where nothing is left, or where the cell holds neither text nor a number.
    """
    answer = unboxed(_as_text(value, "answer").strip())
    if not answer:
        raise BadRow("answer empty", f"the answer is {value!r}")
    return answer


def read_kind(value: object) -> str:
    """The kind in a cell: text or a number, "" where there is none; BadRow for anything else."""
    return _as_text(value, "kind").strip()


def unboxed(answer: str) -> str:
    r"""What stands in the one \boxed{} around all of `answer`; `answer` where there is none."""
    if not answer.startswith(_BOXED):
        return answer
    depth, escaped = 1, False
    for position, letter in enumerate(answer[len(_BOXED) :], start=len(_BOXED)):
        if not escaped:
            depth += (letter == "{") - (letter == "}")
        escaped = letter == "\\" and not escaped
        if depth == 0:
            whole = position == len(answer) - 1
            return answer[len(_BOXED) : position].strip() if whole else answer
    return answer


def _as_text(value: object, name: str) -> str:
    if value is None or value != value:  # NaN is what data frames write for a missing value
        return ""
    if not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise BadRow("wrong type", f"the {name} is {kind}; it must be text or a number")
    return _encodable(str(value), name)


def _encodable(text: str, name: str) -> str:
    """`text` itself; BadRow where it holds half a surrogate pair, which no tokenizer can take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("not UTF-8", f"the {name} cannot be encoded: {error.reason}") from error
    return text

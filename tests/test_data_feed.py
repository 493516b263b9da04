"""Laws of the feed and of its ledger: what is drawn, in which order, and what stops the run."""

import json
import sys
from collections.abc import Set
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import FakeGather, side_by_side

from cppo.data import BadRow, Feed, Item, SkipLedger, TooManySkipped, usable

# The ledger.


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_skipped_row_is_one_line_with_the_running_count_of_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "run" / "skipped.jsonl"
    ledger = SkipLedger(path, max_share=1)
    ledger.skipped("a:1", BadRow("image empty", "zero bytes"))
    ledger.skipped("a:2", BadRow("answer empty", "é"))
    assert len(lines_of(path)) == 2  # on disk at once
    ledger.skipped("a:3", BadRow("image empty", "zero bytes"))
    assert lines_of(path) == [
        {"row": "a:1", "reason": "image empty", "detail": "zero bytes", "count": 1},
        {"row": "a:2", "reason": "answer empty", "detail": "é", "count": 1},
        {"row": "a:3", "reason": "image empty", "detail": "zero bytes", "count": 2},
    ]


def test_a_row_met_again_is_neither_counted_nor_written_again(tmp_path: Path) -> None:
    ledger = SkipLedger(tmp_path / "skipped.jsonl", max_share=0.5, minimum_rows=1)
    for _ in range(3):
        for name in ("a", "b", "c"):
            ledger.read(name)
        ledger.skipped("d", BadRow("image empty"))
    assert ledger.share == 0.25
    assert len(lines_of(tmp_path / "skipped.jsonl")) == 1


def test_a_row_that_was_ever_bad_counts_as_bad_alone() -> None:
    ledger = SkipLedger(None, max_share=1)
    for name in ("a", "b", "c", "d"):
        ledger.read(name)
    ledger.skipped("a", BadRow("image file missing"))  # deleted while the run went on
    assert ledger.share == 0.25
    ledger.read("a")
    assert ledger.share == 0.25


def test_the_run_stops_above_the_share_and_not_at_it(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    ledger = SkipLedger(path, max_share=0.2, minimum_rows=10)
    for number in range(8):
        ledger.read(f"good:{number}")
    ledger.skipped("bad:1", BadRow("image truncated", "12 bytes"))
    ledger.skipped("bad:2", BadRow("answer empty", "''"))
    assert ledger.share == 0.2
    with pytest.raises(TooManySkipped) as caught:
        ledger.skipped("bad:3", BadRow("image truncated", "13 bytes"))
    assert str(caught.value).splitlines() == [
        "3 of 11 rows were skipped (27.3%)",
        "  2 image truncated, such as bad:1: 12 bytes",
        "  1 answer empty, such as bad:2: ''",
        f"A share of 20.0% is allowed. Each is named in {path}. Repair the rows, or set the "
        "columns and limits that fit them, or raise dataset.max_skipped_share.",
    ]
    assert isinstance(caught.value, ValueError)
    assert len(lines_of(path)) == 3


def test_a_few_first_rows_do_not_stop_the_run() -> None:
    ledger = SkipLedger(None, max_share=0.05, minimum_rows=20)
    for number in range(19):
        ledger.skipped(f"bad:{number}", BadRow("image empty"))
    with pytest.raises(TooManySkipped, match="20 of 20 rows"):
        ledger.skipped("bad:19", BadRow("image empty"))


def test_a_resumed_ledger_goes_on_after_the_lines_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    SkipLedger(path, max_share=1).skipped("a", BadRow("image empty", "zero bytes"))
    with path.open("a") as file:
        file.write('{"row": "b", "rea')  # the process ended here
    ledger = SkipLedger(path, max_share=0.5, minimum_rows=1)
    assert ledger.share == 0  # what an earlier process met is no part of this one's share
    ledger.read("c")
    ledger.skipped("a", BadRow("image empty", "zero bytes"))
    ledger.read("d")
    ledger.skipped("b", BadRow("image empty", "zero bytes"))
    lines = path.read_text().splitlines()
    assert [json.loads(lines[n])["row"] for n in (0, 2)] == ["a", "b"]
    assert json.loads(lines[2])["count"] == 2
    assert len(lines) == 3


def test_the_ledger_holds_on_to_no_picture() -> None:
    ledger = SkipLedger(None, max_share=1)
    bad = BadRow("image empty")
    references = sys.getrefcount(bad)
    ledger.skipped("a", bad)
    assert sys.getrefcount(bad) == references


# The feed.


class Numbers:
    """A source of numbered items; those in `bad` are refused."""

    def __init__(self, count: int, bad: Set[int] = frozenset()) -> None:
        self._count, self._bad = count, bad

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Item:
        if index in self._bad:
            raise BadRow("image empty", "zero bytes", row=f"numbers:{index}")
        return Item(row=f"numbers:{index}", images=(), question="?", answer=str(index))


def feed(source: Numbers, seed: int = 0, **options: object) -> Feed:
    return Feed(source, SkipLedger(None, max_share=1), seed=seed, **options)  # type: ignore[arg-type]


def answers(items: list[Item]) -> list[int]:
    return [int(item.answer) for item in items]


def test_an_epoch_gives_every_usable_row_once_in_an_order_of_its_own() -> None:
    source = feed(Numbers(20, bad={3, 7}))
    epochs = [answers(source.take(18)) for _ in range(3)]
    assert all(sorted(epoch) == sorted({*range(20)} - {3, 7}) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_is_a_function_of_the_seed() -> None:
    assert answers(feed(Numbers(10), 1).take(25)) == answers(feed(Numbers(10), 1).take(25))
    assert answers(feed(Numbers(10), 1).take(25)) != answers(feed(Numbers(10), 2).take(25))
    # Pinned: a resumed run must go on in the same order with another version of Python.
    assert answers(feed(Numbers(6), 0).take(6)) == [4, 1, 5, 0, 2, 3]


@given(st.integers(0, 40), st.integers(1, 15), st.integers(0, 2**31))
def test_how_the_items_are_cut_into_batches_does_not_matter(n: int, size: int, seed: int) -> None:
    source = Numbers(7, bad={2})
    at_once, in_batches = feed(source, seed), feed(source, seed)
    batches: list[int] = []
    while len(batches) < n:
        batches += answers(in_batches.take(min(size, n - len(batches))))
    assert batches == answers(at_once.take(n))


@given(st.integers(0, 40), st.integers(0, 2**31))
def test_a_restored_feed_goes_on_with_the_very_next_item(taken: int, seed: int) -> None:
    source = Numbers(9, bad={0, 4})
    first = feed(source, seed)
    first.take(taken)
    saved = json.loads(json.dumps(first.state()))
    second = feed(source, seed)
    second.restore(saved)
    assert answers(second.take(30)) == answers(first.take(30))
    assert second.state() == first.state()


class Counting(Numbers):
    """Remembers what was read."""

    def __init__(self, count: int, bad: Set[int] = frozenset()) -> None:
        super().__init__(count, bad)
        self.read_rows: list[int] = []

    def read(self, index: int) -> Item:
        self.read_rows.append(index)
        return super().read(index)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(2, 3),
    st.lists(st.integers(0, 3).map(lambda n: 6 * n), min_size=1, max_size=4),
    st.sets(st.integers(0, 8), max_size=5),
)
def test_several_processes_share_the_items_that_one_would_take(
    world: int, sizes: list[int], bad: set[int]
) -> None:
    alone = feed(Numbers(9, bad))
    expected = [answers(alone.take(n)) for n in sizes]
    gather = FakeGather(world)
    feeds = [
        feed(Numbers(9, bad), rank=rank, world=world, gather=gather.of(rank))
        for rank in range(world)
    ]
    shares = side_by_side(world, lambda rank: [answers(feeds[rank].take(n)) for n in sizes])
    for number, taken in enumerate(expected):
        own = [shares[rank][number] for rank in range(world)]
        assert sorted(answer for share in own for answer in share) == sorted(taken)
        assert {len(share) for share in own} == {len(taken) // world}
        if not bad:
            assert own == [taken[rank::world] for rank in range(world)]
    assert all(each.state() == alone.state() for each in feeds)


def test_each_row_is_read_by_one_process() -> None:
    """So that a picture is decoded and prepared once, however many processes there are."""
    gather, sources = FakeGather(2), [Counting(12, {0, 3, 5}), Counting(12, {0, 3, 5})]
    checked: list[list[int]] = [[], []]
    feeds = [
        feed(
            sources[rank],
            rank=rank,
            world=2,
            gather=gather.of(rank),
            check=lambda item, rank=rank: checked[rank].append(int(item.answer)),
        )
        for rank in (0, 1)
    ]
    taken = side_by_side(2, lambda rank: answers(feeds[rank].take(8)))
    read = sources[0].read_rows + sources[1].read_rows
    assert len(set(read)) == len(read)
    assert taken == checked  # what it gets was checked there


def test_every_process_knows_of_the_rows_that_another_could_not_use() -> None:
    gather, ledgers = FakeGather(2), [SkipLedger(None, max_share=0.1) for _ in range(2)]

    def stopped(rank: int) -> str:
        source = Numbers(100, bad=set(range(0, 100, 2)))
        shared = Feed(source, ledgers[rank], seed=0, rank=rank, world=2, gather=gather.of(rank))
        with pytest.raises(TooManySkipped) as caught:
            shared.take(100)
        return str(caught.value)

    first, second = side_by_side(2, stopped)
    assert first == second


def test_a_feed_is_not_restored_onto_other_data_or_another_seed() -> None:
    state = feed(Numbers(9), 1).state()
    with pytest.raises(ValueError, match="saved with rows=9 and cannot go on with rows=8"):
        feed(Numbers(8), 1).restore(state)
    with pytest.raises(ValueError, match="saved with seed=1 and cannot go on with seed=2"):
        feed(Numbers(9), 2).restore(state)


def test_what_the_check_refuses_is_skipped_with_its_reason(tmp_path: Path) -> None:
    def check(item: Item) -> None:
        if int(item.answer) % 2:
            raise BadRow("prompt too long", "900 tokens; at most 512")

    ledger = SkipLedger(tmp_path / "skipped.jsonl", max_share=1)
    source = Feed(Numbers(6), ledger, seed=0, check=check)
    assert sorted(answers(source.take(3))) == [0, 2, 4]
    source.take(3)
    lines = lines_of(tmp_path / "skipped.jsonl")
    assert sorted(str(line["row"]) for line in lines) == ["numbers:1", "numbers:3", "numbers:5"]
    assert {line["reason"] for line in lines} == {"prompt too long"}


def test_the_feed_stops_where_the_ledger_does() -> None:
    ledger = SkipLedger(None, max_share=0.1)
    with pytest.raises(TooManySkipped, match="image empty"):
        Feed(Numbers(100, bad=set(range(0, 100, 2))), ledger, seed=0).take(100)


def test_a_small_source_is_judged_at_the_end_of_its_epoch() -> None:
    source = Feed(Numbers(10, bad={1, 2}), SkipLedger(None, max_share=0.1), seed=0)
    assert len(source.take(8)) == 8
    with pytest.raises(TooManySkipped, match=r"2 of 10 rows were skipped \(20.0%\)"):
        source.take(1)
    with pytest.raises(TooManySkipped, match="2 of 10 rows"):
        list(usable(Numbers(10, bad={1, 2}), SkipLedger(None, max_share=0.1)))


def test_a_source_with_nothing_to_use_ends_the_run_instead_of_spinning() -> None:
    with pytest.raises(ValueError, match=r"not one of the source's 5 rows can be used") as caught:
        feed(Numbers(5, bad=set(range(5)))).take(1)
    assert "5 image empty, such as numbers:" in str(caught.value)
    with pytest.raises(ValueError, match="no rows to feed from"):
        feed(Numbers(0))

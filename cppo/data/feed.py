"""Drawing items from a source; the rows that cannot be used go to a ledger."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from cppo.data.item import BadRow, Item, Source
from cppo.data.skips import SkipLedger


class Feed:
    """Items without end: every row once an epoch, in an order drawn from `seed` and the epoch.

    A row that cannot be used, or that `check` refuses with a BadRow, goes to the ledger instead.

    Several processes share the reading: each decodes and checks the rows that it is to have, and
    no others; `gather` (a collective: the lists of all, joined) tells all of them which of these
    can be used.
    """

    def __init__(
        self,
        dataset: Source,
        ledger: SkipLedger,
        *,
        seed: int,
        check: Callable[[Item], None] | None = None,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[list[Any]], list[Any]] = lambda values: values,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("the source has no rows to feed from: give one that has some.")
        self._dataset, self._ledger, self._check = dataset, ledger, check
        self._seed = seed
        self._rank, self._world, self._gather = rank, world, gather
        self._start(epoch=0)

    def take(self, n: int) -> list[Item]:
        """This process's share of the next `n` usable items, over as many epochs as they take:
        every `world`-th row, and what takes the place of those that cannot be used.

        TooManySkipped where the ledger stops the run; at the end of an epoch its share holds for
        any number of rows. ValueError where a whole epoch has not one usable row.
        """
        shares: list[list[int]] = [[] for _ in range(self._world)]
        items: list[Item] = []
        while sum(map(len, shares)) < n:
            if self._position == len(self._order):
                self._end_epoch()
            lacking = self._lacking(n, shares)
            block = self._order[self._position : self._position + len(lacking)]
            self._position += len(block)
            own = [index for rank, index in zip(lacking, block, strict=False) if rank == self._rank]
            read = [_read(self._dataset, index, self._check) for index in own]
            items += [found for found in read if isinstance(found, Item)]
            verdicts = [(found.row, None if isinstance(found, Item) else found) for found in read]
            known = dict(self._gather([*zip(own, verdicts, strict=True)]))
            for rank, index in zip(lacking, block, strict=False):
                row, bad = known[index]
                _note(self._ledger, row, bad)
                if bad is None:
                    self._usable += 1
                    shares[rank].append(index)
        return items

    def _lacking(self, n: int, shares: list[list[int]]) -> list[int]:
        """The process that is to read each row that is still missing, in turn."""
        return [
            place % self._world
            for place in range(n)
            if place // self._world >= len(shares[place % self._world])
        ]

    def state(self) -> dict[str, int]:
        """Where the feed stands: what `restore` needs to go on with the very next item."""
        return {
            "seed": self._seed,
            "rows": len(self._dataset),
            "epoch": self._epoch,
            "position": self._position,
            "usable": self._usable,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Go on where a feed of the same rows and seed stood; ValueError where these differ."""
        for name, here in (("seed", self._seed), ("rows", len(self._dataset))):
            if state[name] != here:
                raise ValueError(
                    f"the feed was saved with {name}={state[name]} and cannot go on with "
                    f"{name}={here}: resume with the data and seed it had, or start a new run."
                )
        self._start(epoch=state["epoch"])
        self._position, self._usable = state["position"], state["usable"]

    def _start(self, *, epoch: int) -> None:
        self._epoch, self._position, self._usable = epoch, 0, 0
        self._order = _shuffled(len(self._dataset), self._seed, epoch)

    def _end_epoch(self) -> None:
        if self._usable == 0:
            raise ValueError(
                f"not one of the source's {len(self._dataset)} rows can be used: repair them, or "
                f"set the columns and limits that fit them.\n{self._ledger.summary()}"
            )
        self._ledger.check()
        self._start(epoch=self._epoch + 1)


def usable(
    dataset: Source, ledger: SkipLedger, *, check: Callable[[Item], None] | None = None
) -> Iterator[tuple[int, Item]]:
    """Every usable item once, in order and with its index; at the end the ledger's share holds
    for any number."""
    for index in range(len(dataset)):
        found = _read(dataset, index, check)
        if isinstance(found, Item):
            _note(ledger, found.row, None)
            yield index, found
        else:
            _note(ledger, found.row, found)
    ledger.check()


def _read(dataset: Source, index: int, check: Callable[[Item], None] | None) -> Item | BadRow:
    """The item, or what is wrong with its row, which it then names."""
    row = ""
    try:
        item = dataset.read(index)
        row = item.row
        if check is not None:
            check(item)
        return item
    except BadRow as bad:
        return BadRow(bad.reason, bad.detail, row=row or bad.row or str(index))


def _note(ledger: SkipLedger, row: str, bad: BadRow | None) -> None:
    if bad is None:
        ledger.read(row)
    else:
        ledger.skipped(row, bad)


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch; by hash, so that no other version of Python changes a resumed run."""

    def draw(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{epoch}:{index}".encode(), digest_size=16).digest()

    return sorted(range(count), key=draw)

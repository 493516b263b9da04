"""What a person sees while a run goes on, and how they stop it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cppo.evaluation.metrics import Estimate


class StopRequest:
    """Ctrl-C or SIGTERM asks for a clean end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.signal = 0  # what asked for it; 0 while nothing did

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        previous = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
        for sign in previous:
            signal.signal(sign, self._hear)
        try:
            yield self
        finally:
            for sign, handler in previous.items():
                signal.signal(sign, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Console:
    """Progress bars with the time left, and tables; silent where not `active`."""

    def __init__(self, *, active: bool = True) -> None:
        # What is said holds names of files and rows of data: none of it is markup.
        self.rich = RichConsole(quiet=not active, highlight=False, markup=False, emoji=False)

    def say(self, text: str) -> None:
        self.rich.print(text, soft_wrap=True)  # a command or a path stays whole, to be copied

    @contextmanager
    def progress(
        self, what: str, total: int, *, window_seconds: float = 30.0
    ) -> Iterator[Callable[[float, str], None]]:
        """A bar; the function that it gives takes what is done so far and a note. The time left is
        told by the speed within the window."""
        columns = (
            TextColumn(f"{what:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(
            *columns,
            console=self.rich,
            refresh_per_second=2,
            speed_estimate_period=window_seconds,
        ) as bar:
            task = bar.add_task(what, total=total, note="")

            def show(done: float, note: str = "") -> None:
                bar.update(task, completed=done, note=note)

            yield show

    def table(self, title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        made = Table(title=title, title_justify="left")
        for name in header:
            made.add_column(name, overflow="fold")  # nothing is cut: addresses are to be copied
        for row in rows:
            made.add_row(*row)
        self.rich.print(made)

    def estimates(self, title: str, results: Mapping[str, Estimate]) -> None:
        rows = [(name, percent(result)) for name, result in results.items()]
        self.table(title, ("", "95 % interval"), rows)


def percent(estimate: Estimate) -> str:
    """An estimate of a share, as people read it."""
    value, low, high = (100 * v for v in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} %  [{low:.1f}, {high:.1f}]"


def points(difference: Estimate) -> str:
    """A difference of shares, in percentage points."""
    value, low, high = (100 * v for v in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} points  [{low:+.1f}, {high:+.1f}]"


def set_up_logging() -> None:
    """Our own log lines as plain text; libraries speak up only where something is wrong."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("cppo").setLevel(logging.INFO)

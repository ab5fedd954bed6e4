"""The terminal. Only the launcher draws on it, and only here.

Three modes, the same calls: ``live`` keeps a region at the bottom of a terminal and prints lines above it; ``plain``
prints lines, one for each epoch that ends (at most one a second), and a line of progress now and then; ``json`` prints one object a line. What is drawn is decided by
:mod:`paceline.observe.picture`.

**A terminal that goes away does not end the run.** ``paceline run | head`` closes the pipe, a terminal is hung up, a
disk is full: the stream is then silent for the rest of the run. Trouble inside of rich turns the screen to ``plain``.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal, TextIO, cast

from paceline.observe.picture import Meter, Strip, epoch_line, headline, region
from paceline.observe.pipe import Pipe
from paceline.observe.plain import plain
from paceline.observe.words import RANK, place, ranks
from paceline.terms.activity import Phase, Snapshot

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

Mode = Literal["auto", "live", "plain", "json"]

_FRAME = 0.1  # seconds between two drawings of the region
_OFTEN, _SELDOM = 2.0, 5.0  # seconds between lines of progress: first, and once a run has lasted some minutes
_EPOCHS = 1.0  # seconds between lines of epochs that have ended
_IDLE = 30.0  # seconds after which a line of progress is printed although nothing has changed
_MOVES = re.compile(  # what a line of a rank may not do to the screen: anything but colours
    r"\x1b\[[0-9;?]*[A-Za-ln-z]"  # move, erase, switch modes
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # set the title
    r"|\x1b[ -/]*[0-Z\\^-~]"  # save, restore, select character sets
    r"|[\x00-\x08\x0a-\x1a\x1c-\x1f\x7f]"
)


class Screen:
    """Shows one run. No method raises, whatever becomes of the terminal.

    Args:
        size: Number of ranks.
        mode: ``auto`` is ``live`` on a terminal that can move its cursor, else ``plain``.
        out: Where to draw; standard output by default.
        err: Where lines of the ranks' standard error go in ``plain`` mode; standard error by default.
        clock: Monotonic seconds; only for the time between two drawings.

    Attributes:
        noun: What the numbers of the snapshots are called, see ``words``.
    """

    def __init__(
        self,
        size: int,
        *,
        mode: Mode = "auto",
        out: TextIO | None = None,
        err: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.size, self.noun = size, RANK
        self._out = Pipe(out if out is not None else sys.stdout)
        self._err = Pipe(err if err is not None else sys.stderr)
        self._clock = clock
        self._meter = Meter()
        self._lines: list[Text] = []
        self._console: Console | None = None
        self._live: Live | None = None
        self._began = self._drawn = self._told = clock()
        self._epoch_told = self._began - _EPOCHS
        self._epoch: tuple[int, int, Mapping[str, float]] | None = None  # that has ended, and was not told yet
        self._said = _said(0, 0, {})  # nothing, which is not worth a line
        self.mode: Literal["live", "plain", "json"] = self._choose(mode)

    def line(self, text: str, label: str | None = None, err: bool = False) -> None:
        """Show one line: of the ranks named by `label`, or Paceline's own. It appears with the next drawing.

        Colours of the text are kept, everything else that a terminal would obey is taken out.
        """
        for part in text.splitlines() or [""]:
            self._one_line(_MOVES.sub("", part.expandtabs()), label, err)

    def _one_line(self, text: str, label: str | None, err: bool) -> None:
        if self.mode == "json":
            self._object("line", label=label, stream="stderr" if err else "stdout", text=text)
        elif self.mode == "live":
            self._safely(lambda: self._above(text, label))
        else:
            (self._err if err else self._out).say(f"{label} {text}" if label else text)

    def update(self, snapshots: Sequence[Snapshot], values: Mapping[str, float], now: float) -> None:
        """Show what the ranks do now. May be called as often as one likes; draws ten times a second at most."""
        self._meter.see(snapshots, now)
        if self.mode == "live":
            if self._clock() - self._drawn >= _FRAME:
                self._safely(lambda: self._draw(snapshots, values, now))
            return
        if self._epoch is not None and self._clock() - self._epoch_told >= _EPOCHS:
            self._tell_epoch(*self._epoch)
        if self._is_time():
            self._tell(snapshots, values)

    def epoch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """An epoch has ended. Of several that end within a second the last is told, with the next update or the end."""
        self._epoch = (epoch, step, values) if self.mode != "live" else None

    def finish(self, lines: Sequence[str], data: Mapping[str, Any] | None = None, err: bool = False) -> None:
        """The last words: take the region away, show the summary. `data` is the summary for ``json`` mode."""
        self._safely(self._stop)
        if self._epoch is not None:
            self._tell_epoch(*self._epoch)
        if self.mode == "json":
            self._object("summary", lines=list(lines), **(data or {}))
            return
        for text in lines:
            self.line(text, err=err)
        self._safely(self._flush)

    def close(self) -> None:
        """Give the terminal back as it was found. Idempotent."""
        self._safely(self._stop)
        self._safely(self._flush)
        self._out.flush()
        self._err.flush()

    # -- plain and json
    def _is_time(self) -> bool:
        now = self._clock()
        return now - self._told >= min(_SELDOM, max(_OFTEN, (now - self._began) / 50))

    def _tell_epoch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        self._epoch, self._epoch_told = None, self._clock()
        progress = self._meter.progress()
        if self.mode == "plain":
            self._told = self._epoch_told
            self._out.say(epoch_line(epoch, step, progress, values))
        else:
            rate = progress.samples_per_second
            self._object("epoch", epoch=epoch, step=step, samples_per_second=rate, values=dict(values))

    def _tell(self, snapshots: Sequence[Snapshot], values: Mapping[str, float]) -> None:
        progress = self._meter.progress()
        said = _said(progress.step, progress.epoch, values)
        idle = said == self._said
        if idle and self._clock() - self._told < _IDLE:
            return
        self._said, self._told = said, self._clock()
        if self.mode == "plain":
            self._out.say(headline(progress, values) + (_places(snapshots, self.noun) if idle else ""))
            return
        self._object(
            "progress",
            step=progress.step,
            epoch=progress.epoch,
            samples=progress.samples,
            samples_per_second=progress.samples_per_second,
            values=dict(values),
            ranks=[_rank(s) for s in snapshots],
        )

    def _object(self, kind: str, **data: Any) -> None:
        self._out.say(json.dumps(plain({"kind": kind, **data}), allow_nan=False))

    # -- live
    def _choose(self, mode: Mode) -> Literal["live", "plain", "json"]:
        if mode != "auto":
            return mode
        if not self._out.isatty():
            return "plain"
        console = self._terminal()
        return "live" if console.is_terminal and not console.is_dumb_terminal else "plain"

    def _terminal(self) -> Console:
        if self._console is None:
            from rich.console import Console

            file = cast("IO[str]", self._out.text)
            self._console = Console(file=file, highlight=False, markup=False, emoji=False)
        return self._console

    def _above(self, text: str, label: str | None) -> None:
        """Keep a line for the next drawing: one drawing for many lines is quick and does not flicker."""
        from rich.text import Text

        line = Text.from_ansi(text) if "\x1b" in text else Text(text)
        if label:
            line = Text.assemble((label, "cyan"), " ", line)
        elif re.match(r"(error|warning)\[PL\d", text):
            line.stylize("bold red" if text.startswith("error") else "bold yellow")
        self._lines.append(line)
        if self._live is None or self._clock() - self._drawn >= _FRAME:
            self._flush()

    def _draw(self, snapshots: Sequence[Snapshot], values: Mapping[str, float], now: float) -> None:
        from rich.live import Live
        from rich.text import Text

        console = self._terminal()
        width, height = console.size
        strips = region(
            snapshots,
            values,
            self._meter,
            now=now,
            width=max(1, width - 1),  # the last column makes some terminals wrap
            height=max(1, height - 2),
            unicode=console.encoding.startswith("utf"),
            noun=self.noun,
        )
        picture = Text("\n", no_wrap=True, overflow="crop").join(_text(strip) for strip in strips)
        if self._live is None:
            self._live = Live(
                console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        with console:  # one write for the lines and the region
            self._flush()
            self._live.update(picture, refresh=True)
        self._drawn = self._clock()

    def _flush(self) -> None:
        """Print the lines kept, above the region."""
        lines, self._lines = self._lines, []
        if lines:
            from rich.console import Group

            self._terminal().print(Group(*lines), soft_wrap=True)  # the terminal wraps, so that a copied line is whole

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            self._flush()
            live.stop()

    def _safely(self, action: Callable[[], None]) -> None:
        """Do something with rich; if that fails, show plain lines from here on."""
        if self.mode != "live":
            return
        try:
            action()
        except Exception as failure:
            self.mode = "plain"
            self._show_cursor()
            lines, self._lines = self._lines, []
            for line in lines:
                self._out.say(line.plain)
            self._out.say(f"the live view failed ({type(failure).__name__}: {failure}); plain lines follow")

    def _show_cursor(self) -> None:
        """What rich may have left undone."""
        self._live = None
        self._out.write("\x1b[?25h\n")


def _text(strip: Strip) -> Text:
    from rich.text import Text

    return Text.assemble(*strip, no_wrap=True, overflow="crop")


def _said(step: int, epoch: int, values: Mapping[str, float]) -> str:
    return f"{step} {epoch} {dict(values)}"


def _places(snapshots: Sequence[Snapshot], noun: str) -> str:
    """Where the ranks are that do not wait; for when nothing else has changed."""
    busy = [s for s in snapshots if s.phase is not Phase.WAIT] or snapshots
    places = list(dict.fromkeys(filter(None, map(place, busy))))[:3]
    return f" · {ranks([s.rank for s in busy], noun)} at {', '.join(places)}" if places else ""


def _rank(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "rank": snapshot.rank,
        "phase": snapshot.phase.name.lower(),
        "step": snapshot.step,
        "what": snapshot.what,
        "where": snapshot.where,
        "waits_for": list(snapshot.waits_for),
    }

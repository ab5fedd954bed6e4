"""The user's object in a run with parameter servers: a worker's, and a server's until its loop begins.

All processes run the same script. Where a worker's loop begins it attaches to the servers; where a server's would begin it serves,
and its script goes no further.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from paceline.data.streams import Streams
from paceline.exchange.chain import Exchange
from paceline.exchange.strategy import build
from paceline.group.secure import connect
from paceline.group.wire import Wire
from paceline.terms.activity import Activity, Phase
from paceline.terms.clock import Clock
from paceline.terms.errors import PacelineError, Stopped, UsageError
from paceline.terms.event import Event, Sink
from paceline.terms.plan import Place
from paceline.train import adopt as adoption
from paceline.train import served
from paceline.train.job import Job
from paceline.train.keeping import Kept
from paceline.train.lead import Lead
from paceline.train.ledger import Ledger
from paceline.train.loaders import Loaders
from paceline.train.serve import Server
from paceline.train.served import Served
from paceline.train.talk import CAPS

_GREETING = 5.0  # seconds for a connection


class ServedJob(Job):
    """See :class:`~paceline.train.job.Job`.

    Args:
        place: Who this process is, and where the servers are.
        sink: Where events go.
        activity: Where this process says what it is doing.
        secret: Of the run.
    """

    def __init__(self, place: Place, sink: Sink, activity: Activity, secret: bytes) -> None:
        super().__init__(replace(place, size=1), _no_wire, sink, activity)
        self._secret, self._number, self._attached = secret, place.rank, False
        self._streams = Streams(max(place.rank, 0), 2, self._share_stream)
        self._loaders = Loaders(self._loop, self._streams, activity, self._join, lambda: None)
        self._served = Served(
            place,
            lambda address: connect(address, secret, place.name, _GREETING, caps=CAPS),
            self._loop,
            activity,
            self._on_view,
        )
        self._loaders.leases = self._served
        self._stream_taken = False

    @property
    def serves(self) -> bool:
        """This process is a server."""
        return self._place.serves >= 0

    @property
    def main(self) -> bool:
        """True on exactly one worker."""
        return self._place.rank == 0 and not self.serves

    @property
    def clock(self) -> Clock:
        """Updates and samples as the servers count them, and the staleness of this worker's last update."""
        return replace(self._loop.clock, version=self._served.version, staleness=self._served.staleness)

    def _ledger_path(self) -> Path | None:
        """Workers write none: the lead knows what was applied."""
        run_dir = self._place.run_dir
        leads = self._place.serves == 0 and run_dir is not None
        return run_dir / "ledger" / f"{self._place.name}.jsonl" if leads and run_dir is not None else None

    # ---- adoption -------------------------------------------------------------------------------------------------
    def use_strategy(self, strategy: str | Exchange) -> None:
        """See :meth:`Job.use_strategy`. Raises UsageError PL209 for one that needs other servers than were started."""
        super().use_strategy(strategy)
        self._service()

    def _service(self) -> Exchange:
        if self._exchange is None:
            self._exchange = build(self._strategy)
        service = self._exchange.service
        if service is None or service.servers != len(self._place.servers):
            started = len(self._place.servers)
            raise UsageError("PL209", f"{self._exchange.text}, and {started} servers were started")
        return self._exchange

    def _adopt_launched(self, given: adoption.Adopted) -> dict[int, Any]:
        first = not self.adopted
        before = len(self._schedulers)
        self._register(given)
        exchange = self._service()
        if first:
            data = {"strategy": exchange.text, "wire": "servers", "describe": exchange.describe()}
            self._sink(Event("adopt", 0, data))
        served.refuse(self._scalers, self._schedulers, given.optimizers)
        for optimizer in given.optimizers:
            optimizer.register_step_pre_hook(self._before_first_step)
            if not self.serves:
                self._served.own(optimizer)
        if not self.serves:
            for number, scheduler in enumerate(given.schedulers, before):
                self._served.own_schedule(number, scheduler)
        return {id(loader): self._loaders.own(loader, 0, 1) for loader in given.loaders}

    def _before_first_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._join()

    # ---- the loop begins --------------------------------------------------------------------------------------------
    def _join(self) -> None:
        if self._attached or not self.adopted:
            return
        self._attached = True
        kept = Kept(self._models, self._optimizers, self._schedulers, len(self._place.servers))
        if self.serves:
            self._serve(kept)
            raise Stopped
        self._served.attach(kept)
        self._first_epoch = self._served.first_epoch

    def _serve(self, kept: Kept) -> None:
        """Be a server, to the end."""
        service = self._service().service
        assert service is not None
        place, activity = self._place, self._activity
        lead = None
        ledger = Ledger(self._ledger_path(), self._notice_failure)
        if place.serves == 0:
            lead = Lead(service.rule, ledger, self._sink, self._streams.capture(), place.plan.processes)
        torch.set_num_threads(place.plan.threads)
        activity.enter(Phase.WAIT, "workers")
        with Server(
            kept, service, place.servers, place.serves, self._secret, lambda: activity.board.aborted, lead
        ) as server:
            self._sink(Event("serve", 0, {"server": place.serves, "bytes": kept.layout.nbytes_of(place.serves)}))
            try:
                server.run()
            except BaseException:
                traceback.print_exc()  # into the server's log: what the terminal shows of it is one line
                raise
        if lead is not None:
            lead.report()
            ledger.end(lead.core.version, ())
        ledger.close()

    def _share_stream(self, mine: bytes) -> bytes:
        """Orders are drawn from the lead's random state; after a reseeding by the script, all have the same anyway."""
        taken, self._stream_taken = self._stream_taken, True
        return mine if taken or not self._served.stream else self._served.stream

    def _on_view(self, group: int, members: list[str]) -> None:
        """Workers have come or gone."""
        rank, size = members.index(self._place.name), len(members)
        self._place = replace(self._place, rank=rank, size=size)
        self._sink(Event("view", self._loop.steps, {"epoch": group, "rank": rank, "size": size, "members": members}))

    # ---- together -------------------------------------------------------------------------------------------------
    def _gather_json(self, tag: str) -> Callable[[dict[str, float]], list[dict[str, float]]]:
        def gather(mine: dict[str, float]) -> list[dict[str, float]]:
            self._join()
            if not self._attached:
                return [mine]
            return [json.loads(note) for note in self._served.gather(tag, json.dumps(mine))]

        return gather

    @contextmanager
    def once(self, name: str) -> Iterator[bool]:
        """See :meth:`Job.once`."""
        if not self._attached:
            yield True
            return
        tag = f"once {name!r}"
        if not self.main:
            self._served.gather(tag, "")
        yield self.main
        if self.main:
            self._served.gather(tag, "")

    # ---- the end --------------------------------------------------------------------------------------------------
    def finish(self, error: BaseException | None = None) -> None:
        """The script has ended. All workers leave with the same parameters, unless they were stopped."""
        if self._finished:
            return
        if self.serves:
            self._finished = True
            return
        try:
            if error is None and self._attached:
                self._served.gather("the end", "")
            super().finish(error)
        finally:
            self._served.close(whole=error is None or isinstance(error, Stopped))


def _no_wire(device: torch.device) -> Wire:
    raise PacelineError("PL209", "a run with parameter servers has no wire between its workers")

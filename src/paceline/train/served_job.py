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
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from paceline.data.streams import Streams
from paceline.exchange.chain import Exchange
from paceline.exchange.service import Service
from paceline.exchange.strategy import build
from paceline.group.secure import connect
from paceline.group.wire import Wire
from paceline.terms.activity import Activity, Phase
from paceline.terms.clock import Clock
from paceline.terms.errors import AdoptError, PacelineError, Stopped, UsageError
from paceline.terms.event import Event, Sink
from paceline.terms.plan import Place
from paceline.train import adopt as adoption
from paceline.train import tree as trees
from paceline.train.attempts import earlier
from paceline.train.checkpoint import Checkpointer
from paceline.train.checkpoint_files import CHECKPOINTS, Policy
from paceline.train.job import Job
from paceline.train.keeping import Kept, described
from paceline.train.lead import Lead
from paceline.train.ledger import Ledger
from paceline.train.links import Links
from paceline.train.loaders import Loaders
from paceline.train.pair import Tell
from paceline.train.reach import refuse
from paceline.train.resume import FromDisk, Resume, choose
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
            lambda: self._streams.snapshot().to_json(),
            self._asked,
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
        return None

    def _lead_ledger(self) -> Ledger:
        """A lead that takes over from one that died begins a file of its own."""
        run_dir = self._place.run_dir
        if run_dir is None:
            return Ledger(None, self._notice_failure)
        names = (f"server-0{'' if n == 1 else f'.{n}'}.jsonl" for n in count(1))
        path = next(path for path in (run_dir / "ledger" / name for name in names) if not path.exists())
        return Ledger(path, self._notice_failure)

    # ---- adoption -------------------------------------------------------------------------------------------------
    def use_strategy(self, strategy: str | Exchange) -> None:
        """See :meth:`Job.use_strategy`. Raises UsageError PL209 for one that needs other servers than were started."""
        super().use_strategy(strategy)
        self._service()

    def _service(self) -> Exchange:
        if self._exchange is None:
            self._exchange = build(self._strategy)
        service = self._exchange.service
        if service is None or service.processes != len(self._place.servers):
            started = len(self._place.servers)
            raise UsageError("PL209", f"{self._exchange.text}, and {started} servers were started")
        return self._exchange

    def _asked(self) -> Service:
        service = self._service().service
        assert service is not None
        return service

    def _adopt_launched(self, given: adoption.Adopted) -> dict[int, Any]:
        first = not self.adopted
        before = len(self._schedulers)
        self._register(given)
        exchange = self._service()
        if first:
            data = {"strategy": exchange.text, "wire": "servers", "describe": exchange.describe()}
            self._sink(Event("adopt", 0, data))
        refuse(self._scalers, self._schedulers, self._optimizers, self._asked())
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
        if self.serves:
            self._serve()
            raise Stopped
        self._served.attach(self._kept_things(self._described()))
        self._first_epoch = self._served.first_epoch

    def _serve(self) -> None:
        """Be a server, to the end."""
        service = self._asked()
        place, activity = self._place, self._activity
        description = self._described()
        resumed = self._resumed()
        kept = self._kept_things(description)
        lead, checkpoints = None, None
        if place.serves % service.servers == 0:
            stream = self._streams.capture()
            lead = Lead(service, self._lead_ledger, self._sink, stream, place.plan.processes)
            if resumed is not None:
                lead.restore(resumed)
            if place.run_dir is not None and place.plan.checkpoint:
                checkpoints = Checkpointer(
                    Policy.parse(place.plan.checkpoint),
                    place.run_dir / CHECKPOINTS,
                    lambda: self._whole_state(lead),
                    right=lambda: (len(earlier(place.run_dir)), 0),  # type: ignore[arg-type]
                    sink=self._sink,
                    step=lead.core.version,
                )

        def begins(since: int | None) -> None:
            """This process answers from now on."""
            if lead is not None:
                lead.answers(since)
                if checkpoints is not None:
                    lead.on_boundary = lambda version: checkpoints.at_boundary(version, True)
            if since is not None:
                said = f"{place.name} has taken over from its other copy, after update {server.shard.version}"
                self._sink(Event("notice", server.shard.version, {"message": said}))

        def joined() -> None:
            said = f"{place.name} has the state of its other copy, and can take over"
            self._sink(Event("notice", server.shard.version, {"message": said, "copy": True}))

        def notice(code: str, message: str) -> None:
            self._sink(Event("notice", server.shard.version, {"code": code, "message": message}))

        tell = Tell(begins, joined, notice, lambda: activity.board.aborted)
        torch.set_num_threads(place.plan.threads)
        activity.enter(Phase.WAIT, "workers")
        version = resumed["core"]["version"] if resumed is not None else 0
        everybody = (place.servers, place.doors, place.serves, self._secret)
        try:
            with Links(kept, service, *everybody, place.replaces, tell) as links:
                things = trees.Things(
                    schedulers=trees.numbered(self._schedulers), kept=self._kept, streams=self._streams
                )
                server = Server(kept, service, links, lead, things, place.plan.processes, version)
                links.start(server)
                if resumed is not None and not server.shard.scheduled:
                    server.shard.scheduled = resumed["scheduled"]
                self._sink(Event("serve", 0, {"server": links.index, "bytes": kept.layout.nbytes_of(links.index)}))
                server.run()
                if lead is not None and checkpoints is not None and server.answers:
                    checkpoints.finish(lead.core.version, True, lead.done)
                server.end()
                server.work.close()
        except BaseException:
            traceback.print_exc()  # into the server's log: what the terminal shows of it is one line
            raise
        finally:
            if checkpoints is not None:
                checkpoints.stand_down()
        if lead is not None:
            lead.close(ended=server.answers)

    def _described(self) -> str:
        return described(self._models, self._optimizers, self._schedulers, self._asked().servers)

    def _kept_things(self, description: str) -> Kept:
        return Kept(self._models, self._optimizers, self._schedulers, self._asked().servers, description)

    def _whole_state(self, lead: Lead) -> trees.Tree:
        """The state of the run, after the last update: that of :mod:`~paceline.train.tree`, and what the lead knows."""
        optimizers = lead.optimizers()
        rest = trees.Things(
            models=self._models,
            schedulers=trees.numbered(self._schedulers),
            kept=self._kept,
            names=trees.names_of(self._models),
            streams=self._streams,
        )
        version, epoch = lead.core.version, lead.round
        loop = {"steps": version, "samples": lead.samples, "epoch": epoch, "passed": epoch}
        return {**trees.capture(rest), "optimizers": optimizers, "loop": loop, "served": lead.state()}

    def _resumed(self) -> dict[str, Any] | None:
        """Restore what the script has adopted from a checkpoint, if there is one to go on from; what the lead knew then.

        Raises:
            AdoptError: PL610, it is one of another job, or of a run without servers.
        """
        place = self._place
        if not place.plan.resume or place.run_dir is None:
            return None
        found = choose(place.plan.resume, place.run_dir, 0, lambda raw: [raw], self._saving.notice)
        if found is None:
            return None
        resume, state = Resume(FromDisk(found)), found.said["state"]
        try:
            if "served" not in state:
                message = f"{found.path} was saved by a run without servers, and does not tell which batches are left"
                raise AdoptError("PL610", message)
            resume.restore(
                trees.Things(
                    models=self._models,
                    optimizers=trees.numbered(self._optimizers),
                    schedulers=trees.numbered(self._schedulers),
                    kept=self._kept,
                    names=trees.names_of(self._models),
                )
            )
            resume.begin_loop(trees.Things(streams=self._streams))
        finally:
            resume.close()
        served: dict[str, Any] = state["served"]
        return served

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

"""The adopted loaders: each global batch cut among the ranks, and told to those who keep the books."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from paceline.data.feed import Feed
from paceline.data.leased import LeasedFeed, Leases
from paceline.data.rows import EpochEnd, Slice
from paceline.data.streams import Streams
from paceline.terms.activity import Activity
from paceline.train.loop import Loop


class Loaders:
    """All loaders of a launched job, in the order of adoption.

    Args:
        loop: Where the job stands.
        streams: Where orders are drawn from.
        activity: Where reading is shown.
        before_pass: Called when a loop over a loader begins.
        first_round: In exact mode, called before the first shard of a batch.
    """

    def __init__(
        self,
        loop: Loop,
        streams: Streams,
        activity: Activity,
        before_pass: Callable[[], None],
        first_round: Callable[[], None],
    ) -> None:
        self.feeds: list[Feed] = []
        self.leases: Leases | None = None  # who gives batches out, where no rank has a share
        self.evaluating = False
        self.always_in_step = False  # ranks compute together also where they only look, so none may go without a row
        self._loop, self._streams, self._activity = loop, streams, activity
        self._before_pass, self._first_round = before_pass, first_round

    @property
    def training(self) -> bool:
        """Batches that are handed out now may be trained on."""
        return torch.is_grad_enabled() and not self.evaluating

    def own(self, loader: DataLoader[Any], rank: int, size: int) -> Feed:
        """Take over one loader: rank `rank` of `size` gets its rows of each batch."""
        index = len(self.feeds)
        settings: dict[str, Any] = {
            "streams": self._streams,
            "index": index,
            "activity": self._activity,
            "before_pass": self._on_pass,
            "before_batch": lambda: self._loop.before_batch(self.training),
            "want_phantom": lambda: self.training or self.always_in_step,
            "on_batch": self._on_batch,
            "on_epoch": self._on_epoch_end,
            "before_end": lambda: self._loop.before_end(index),
        }
        if self.leases is not None:
            feed: Feed = LeasedFeed(loader, self.leases, **settings)
        else:
            feed = Feed(loader, rank=rank, size=size, shards=self._loop.shards, **settings)
        self._loop.add_feed(index, feed)
        self.feeds.append(feed)
        return feed

    def _on_pass(self) -> None:
        """A loop over a loader begins; one that only looks sees what all ranks have learned."""
        self._before_pass()
        if not self.training:
            self._loop.on_close()

    def _on_batch(self, batch: Slice) -> None:
        self._loop.on_batch(batch, self.training)
        if batch.shard >= 0 and self.training:
            if batch.round == 0:
                self._first_round()
            self._streams.reseed("shard", batch.loader, batch.epoch, batch.batch, batch.shard)

    def _on_epoch_end(self, end: EpochEnd) -> None:
        self._loop.on_epoch_end(end)
        if self._loop.shards:  # what a rank has drawn so far depends on its shards
            self._streams.reseed("pass", end.loader, end.epoch)

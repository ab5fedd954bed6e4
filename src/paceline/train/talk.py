"""What workers and servers say to each other. Each message is one frame (``group.frames``): a kind, JSON, and perhaps bulk."""

from __future__ import annotations

from enum import IntEnum

from paceline.group.frames import Cap, Caps

MOST = 1 << 40
"""Bytes of bulk: a model's gradients in one message, between hosts."""


class Say(IntEnum):
    """Kinds of messages; see ``served`` (the worker's half) and ``serve`` (the server's)."""

    ATTACH = 1  # worker: this is what I have, and where it lies
    WELCOME = 2  # server: it is what I have
    READY = 3  # worker, to the lead: all servers have welcomed me
    ASK = 4  # worker, to the lead: a piece of a batch
    GRANT = 5
    OVER = 6  # worker, to the lead: the pass has so many batches
    SKIP = 7  # worker, to the lead: pieces are given back
    STEP = 8  # worker: my gradient is there
    GO = 9  # server: the parameters are there
    SCHEDULE = 10  # worker: a schedule has stepped
    MEET = 11  # worker, to the lead: a point that all come to
    MET = 12
    PULL = 13  # worker: the parameters of this version
    PULLED = 14
    REFUSE = 15  # server: this worker ends
    BYE = 16  # worker, to the lead: it has ended well
    ENTER = 17  # server, to the lead: here I am
    PASS = 19  # worker, to the lead: a pass begins, or is asked about
    ORIGIN = 20
    DRAWN = 22  # worker, to the lead: the order of a pass is drawn
    PART = 21  # server, to the lead: what it keeps
    ENTRY = 18  # lead, to the other servers: what is to be done, in order
    COLLECT = 23  # lead, to the other servers: tell what you keep
    HEARD = 24  # server, to the lead: so many entries
    RESUME = 25  # worker: I was connected with the copy that is gone, and have heard so much
    RESUMED = 26  # server: I have heard so much
    ELSEWHERE = 27  # second copy of a server: the first one lives, and answers
    COPY = 28  # a new copy, to the one that is there: give me the state
    WHOLE = 29  # here it is
    RECORD = 30  # first copy: this is what came
    DONE = 31  # second copy: it is carried out
    OPENED = 37  # worker, to the lead: before you began again this pass had come so far
    HERE = 36  # first copy, now and then: I am here
    GONE = 32  # never sent: a worker is gone
    TICK = 33  # never sent: time has passed
    COPIED = 34  # never sent: there is a second copy
    CLOSE = 35  # never sent: the run is over


CAPS: Caps = {
    **{int(kind): Cap(meta=1 << 24) for kind in Say},
    int(Say.STEP): Cap(meta=1 << 24, bulk=MOST),
    int(Say.GO): Cap(meta=1 << 24, bulk=MOST),
    int(Say.PART): Cap(meta=1 << 24, bulk=MOST),
    int(Say.PULLED): Cap(meta=1 << 24, bulk=MOST),
    int(Say.WHOLE): Cap(meta=1 << 24, bulk=MOST),
    int(Say.RECORD): Cap(meta=1 << 25, bulk=MOST),
}

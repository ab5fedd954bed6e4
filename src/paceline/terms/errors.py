"""Every way Paceline says no: one tree of exceptions, one table of stable codes.

An error states what happened, with which value, and what to do. The code never changes its meaning;
``paceline explain PL203`` prints its entry in ``explanations`` at length. Ranges: PL1xx the command line and the launcher,
PL2xx strategies and plans, PL3xx adoption and data, PL4xx the step and the wire, PL5xx what the observer
recognises while a run is alive, PL6xx files.
"""

from __future__ import annotations

from paceline.terms.explanations import EXPLANATIONS

__all__ = [
    "EXPLANATIONS",
    "Aborted",
    "AdoptError",
    "FileError",
    "PacelineError",
    "PeerLost",
    "StepError",
    "Stopped",
    "UsageError",
    "WireError",
]


class PacelineError(Exception):
    """Something Paceline refuses or could not do.

    Args:
        code: Stable code, a key of :data:`EXPLANATIONS`.
        message: What happened, with the value that made it happen.
        help: What to do now, for this very case. Without it the table's general help is shown.
    """

    def __init__(self, code: str, message: str, *, help: str | None = None) -> None:
        assert code in EXPLANATIONS, f"unknown error code {code}"
        super().__init__(message)
        self.code = code
        self.message = message
        self.help = help or EXPLANATIONS[code].help

    def __str__(self) -> str:
        return f"{self.code}: {self.message}\n  help: {self.help}"


class UsageError(PacelineError, ValueError):
    """The request itself cannot be carried out; nothing was started."""


class AdoptError(PacelineError, TypeError):
    """An object given to ``job.adopt`` cannot be driven as asked."""


class StepError(PacelineError, RuntimeError):
    """The training loop did something that would make the numbers wrong."""


class WireError(PacelineError, RuntimeError):
    """The exchange between ranks failed."""


class PeerLost(WireError):
    """A peer died or closed its end while this rank needed it."""


class Aborted(WireError):
    """The run is being ended; whoever waits stops waiting."""


class FileError(PacelineError, OSError):
    """A file of the run could not be written, read or believed."""

    def __str__(self) -> str:
        return PacelineError.__str__(self)


class Stopped(BaseException):
    """The run was asked to stop; unwinds the user's script at a step boundary. Not an ``Exception`` on purpose."""

"""Whose code is a file: the user's, or machinery that a reader wants to skip.

A rule on paths, without looking into files. The script and what lies beside it are the user's; Paceline, torch, the
standard library and anything in a ``site-packages`` are not, even when a virtual environment lies beside the script.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

_PACELINE = str(Path(__file__).resolve().parents[1]) + os.sep
_STANDARD = str(Path(sysconfig.get_paths()["stdlib"]).resolve()) + os.sep
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


class Source:
    """Answers for one script, and remembers its answers: there are few files and many questions.

    Args:
        script: The user's script, or None when a function was launched; then every file that is not machinery counts
            as the user's.
    """

    def __init__(self, script: Path | None) -> None:
        self._script = os.path.realpath(script) if script is not None else None
        self._rooms = _rooms(script) if script is not None else ("",)
        self._known: dict[str, bool] = {}

    def mine(self, filename: str) -> bool:
        """True when `filename`, as code objects name it, is the user's."""
        known = self._known.get(filename)
        if known is None:
            known = self._known[filename] = self._is_mine(filename)
        return known

    def _is_mine(self, filename: str) -> bool:
        if filename.startswith("<"):
            return self._script is None and not filename.startswith("<frozen")
        path = os.path.realpath(filename)
        if path == self._script:
            return True
        return not _installed(path) and not path.startswith((_PACELINE, _STANDARD)) and path.startswith(self._rooms)

    def machinery(self, filename: str) -> bool:
        """True for frames that a traceback can lose: Paceline, torch, the standard library, the import system."""
        if self.mine(filename):
            return False
        if filename.startswith("<frozen"):
            return True
        path = os.path.realpath(filename)
        standard = path.startswith(_STANDARD) and not _installed(path)
        return standard or path.startswith(_PACELINE) or _of_torch(path)


def _rooms(script: Path) -> tuple[str, ...]:
    """Where modules of the script may lie: beside it, and beside the file that it is a link to."""
    beside = os.path.realpath(os.path.dirname(os.path.abspath(script)))
    return os.path.join(beside, ""), os.path.join(os.path.dirname(os.path.realpath(script)), "")


def _installed(path: str) -> bool:
    return any(part in path for part in _INSTALLED)


def _of_torch(path: str) -> bool:
    """torch may also be run from a source tree, so its place is asked for, without importing it."""
    module = sys.modules.get("torch")
    home = getattr(module, "__file__", None)
    return home is not None and path.startswith(os.path.dirname(os.path.realpath(home)) + os.sep)

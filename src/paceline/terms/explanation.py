"""What is said about one code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Explanation:
    """What ``paceline explain`` prints for a code."""

    title: str
    text: str
    help: str

"""Two machines with a network that fails, and a run on both: TLS, TCP, real processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.machines import LEASE, on_both
from support.network import Network, lacking, network


@pytest.fixture
def net() -> Iterator[Network]:
    """Where root cannot have it, that is a failure: a machine for tests has network namespaces."""
    if os.geteuid() != 0:
        pytest.skip(lacking())
    with network() as made:
        yield made


def test_a_link_that_is_slow_and_then_cut(net: Network, tmp_path: Path) -> None:
    """Slow: a step takes half a second, and nobody is left out. Cut: the majority goes on, the other worker commits nothing; when
    the link is healed it is refused, and a new one takes part with the present state."""
    with on_both(net, tmp_path, 2, 1) as both:
        ledgers = both.left.ledgers
        net.limit(1, "1mbit")
        group = ledgers.group
        both.left.watch(1.2 * LEASE)
        both.left.steps(2)
        assert ledgers.group == group
        net.unlimit(1)

        net.cut()
        both.left.until(lambda: len(ledgers.members) == 2, 2 * LEASE + 5, "the majority should go on")
        alone = both.committed(right=True)
        both.left.steps(20)
        assert both.committed(right=True) == alone < both.committed(right=False) - 10
        net.heal()
        both.trains_on_right()
        both.left.steps(20)
        assert both.end() > 40
        assert "worker-100001 is being started" in both.right.said, both.right.said

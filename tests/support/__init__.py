"""Helpers of the tests. Import as ``from support.peers import run_peers``: ``tests/`` is on the path."""

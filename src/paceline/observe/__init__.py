"""Listens to events and to the board, and tells people. Imports :mod:`paceline.terms` and nothing else of Paceline."""

"""Mutants: each guard of the service is removed once, in a copy, and the check that must notice is run there.

A test that stays green without the guard it is about proves nothing. `python -m tests.mutants` shows for every guard
by name which check sees that it is gone.
"""

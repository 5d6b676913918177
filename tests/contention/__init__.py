"""Contention: many processes that want the same row at the same instant, on real databases and a real broker.

`python -m tests.contention` runs them all: races of cancel against completion, hints delivered again and again, and
claimers that all want the oldest job.
"""

"""`anneal demo`: the whole service on one small job, and a table that says whether the model got better."""

from cli.demo.command import demo

__all__ = ["demo"]

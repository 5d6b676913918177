"""Failpoints: one process of the service, made to die or to fail at every write, fsync, rename, commit and message.

    counting run ─► the points of a scenario, by name
    each point × each way to fail ─► fresh service, the scenario up to that point, the fault,
                                     then what production does about it, then the invariants

`python -m tests.failpoints` runs them all. The product holds no hooks: a forked child replaces the functions of the
standard library, SQLAlchemy, redis-py and Celery that have an effect outside of the process (`hooks`), and everything
after the fault runs with the real ones.
"""

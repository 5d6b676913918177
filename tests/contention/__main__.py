"""`python -m tests.contention`: races, duplicate deliveries and claimers; exit status 1 if any outcome is bad.

python -m tests.contention                           SQLite and PostgreSQL, in full
python -m tests.contention --database sqlite --scale 0.1
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.contention import claims, deliveries, races
from tests.contention.service import service
from tests.failpoints.services import databases, running_valkey

RACES, DELIVERIES, CLAIMERS, JOBS = 1000, 10_000, 8, 1000
CALLERS, WORKERS, TRAINED_JOBS = 4, 2, 60


def main() -> int:
    options = _options()
    print(f"seed {options.seed}", flush=True)
    verdict: dict[str, Any] = {"harness": "contention", "seed": options.seed, "results": {}, "bad": 0}
    for kind in options.database:
        for name, part in _parts(options.scale, options.seed).items():
            if options.part not in (None, name):
                continue
            with (
                databases(kind) as source,
                running_valkey() as redis_url,
                tempfile.TemporaryDirectory(prefix="anneal-contention-") as folder,
                service(Path(folder), source.fresh("contention", Path(folder)), redis_url),
            ):
                result = part(Path(folder))
            verdict["results"][f"{kind}: {name}"] = result
            verdict["bad"] += len(result["problems"])
            print(f"{kind}: {name}: {json.dumps(result)[:1500]}", flush=True)
    print(f"{verdict['bad']} bad")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(verdict, indent=1) + "\n")
    return 1 if verdict["bad"] else 0


def _parts(scale: float, seed: int) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """What there is to do, in that many parts of the full count."""

    def scaled(count: int) -> int:
        return max(1, round(count * scale))

    half = scaled(DELIVERIES) // 2
    trained = scaled(TRAINED_JOBS)
    return {
        "cancel against completion": lambda folder: races.run(scaled(RACES), seed),
        "claimers": lambda folder: claims.run(CLAIMERS, scaled(JOBS)),
        "duplicate calls": lambda folder: deliveries.calls(half, CALLERS, trained, folder),
        "duplicate messages": lambda folder: deliveries.messages(half, WORKERS, trained, folder),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.contention", description=__doc__.splitlines()[0])
    parser.add_argument("--database", choices=("sqlite", "postgresql"), nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--part", help="only this one, by name")
    parser.add_argument("--scale", type=float, default=1.0, help="of the full counts")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="of the waits in the races")
    parser.add_argument("--out", type=Path, help="where the verdict goes, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.campaign`: strike the whole service with random faults, then prove that nothing was lost.

    python -m tests.campaign --faults 1000 --jobs 150 --database sqlite --seed 7 --out benchmarks/results

Prints the seed first. Exit status 1: something that must not be was found; the working folder, with every log, is
kept then, and the verdict names it.
"""

import argparse
import json
import random
import shutil
import signal
import sys
from pathlib import Path

from tests.campaign import report
from tests.campaign.campaign import Campaign
from tests.campaign.options import Options


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    options, out, keep = _options()
    print(f"SEED={options.seed}", flush=True)
    campaign = Campaign(options, lambda text: print(text, flush=True))
    print(f"working in {campaign.folder}", flush=True)
    campaign.run()
    result = report.verdict(campaign)
    where = campaign.folder if out is None else out
    where.mkdir(parents=True, exist_ok=True)
    name = f"campaign_{options.trainer}_{options.database}"
    (where / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if out is not None:
        shutil.copy(campaign.folder / "faults.jsonl", out / f"{name}_faults.log")
    print(report.summary(result), flush=True)
    if result["good"] and not keep:
        campaign.clean_up()
    else:
        print(f"everything is in {campaign.folder}", flush=True)
    return 0 if result["good"] else 1


def _options() -> tuple[Options, Path | None, bool]:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=150)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--trainer", choices=("toy", "unsloth"), default="toy")
    parser.add_argument("--lease", type=float, default=4, help="ANNEAL_LEASE_S")
    parser.add_argument("--wait", type=float, default=None, help="mean seconds between faults")
    parser.add_argument("--minutes", type=float, default=60, help="no more faults after this")
    parser.add_argument("--garbage-age", type=float, default=40, help="ANNEAL_GARBAGE_AGE_S")
    parser.add_argument("--generators", type=int, default=2, help="0: nobody asks anything, live or in batches")
    parser.add_argument("--batches", type=int, default=10, help="at least so many")
    parser.add_argument("--out", type=Path, default=None, help="folder for the verdict and the fault log")
    parser.add_argument("--keep", action="store_true", help="keep the working folder")
    given = parser.parse_args()
    options = Options(
        seed=random.SystemRandom().randrange(2**31) if given.seed is None else given.seed,
        faults=given.faults,
        jobs=given.jobs,
        database=given.database,
        trainer=given.trainer,
        lease_s=given.lease,
        mean_wait_s=given.wait,
        minutes=given.minutes,
        generators=given.generators,
        batches=given.batches if given.generators else 0,
        garbage_age_s=given.garbage_age,
    )
    return options, given.out, given.keep


if __name__ == "__main__":
    sys.exit(main())

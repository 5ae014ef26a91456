"""`python -m tests.soak.backups --kills 300 --seed N`: writers that are killed, and a dated report. Exit status 1 where a backup was bad."""

import argparse
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from tests.soak.chaos import EVIDENCE, _commit
from tests.unit.agent.backup.victims import campaign


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the report goes")
    arguments = parser.parse_args()
    began, problem, compared = datetime.now(UTC), "", 0
    with tempfile.TemporaryDirectory(prefix="tt-backups-") as folder:
        try:
            compared = campaign(Path(folder), seed=arguments.seed, rounds=-(-arguments.kills // 2))
        except AssertionError as error:
            problem = str(error) or "a restore differed"
    report = {
        "began": began.isoformat(),
        "commit": _commit(),
        "seed": arguments.seed,
        "kills": arguments.kills,
        "restores_compared": compared,
        "seconds": round((datetime.now(UTC) - began).total_seconds()),
        "problem": problem,
    }
    arguments.evidence.mkdir(exist_ok=True, parents=True)
    path = arguments.evidence / f"backups-{began:%Y-%m-%d-%H%M%S}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))  # noqa: T201
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())

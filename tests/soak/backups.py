"""What backups must survive, at random and for long, with a dated report. Exit status 1 where a backup was bad.

    python -m tests.soak.backups [--kills 300] [--histories 300] [--losses 2000] [--seed N]

kills         two writers of a folder that also prune are killed by SIGKILL, as processes; after each pair every listed backup is restored
repositories  writers, deaths at any call of the store, prunes, flipped bits, hours that pass: `tests/properties/test_backup_repository.py`
vms           written, backed up, killed, aborted, stopped, moved, reverted, grown, given disks: `tests/unit/agent/backup/test_running.py`
power         the power fails at a sync; what was not synced is there, or not, or in part: `tests/unit/agent/backup/test_power_loss.py`
"""

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from tests.properties import test_backup_repository as repositories
from tests.soak.evidence import EVIDENCE, current_commit
from tests.unit.agent.backup import test_power_loss as power
from tests.unit.agent.backup import test_running as vms
from tests.unit.agent.backup.victims import campaign

LOSSES_PER_LIFE = 60


def repository_histories(seed: int, count: int) -> int:
    dice = random.Random(seed)
    for _ in range(count):
        steps = [(dice.choice(repositories.STEPS), dice.randrange(160)) for _ in range(40)]
        repositories.finish(repositories.play(steps))
    return count


def vm_histories(seed: int, count: int) -> int:
    dice = random.Random(seed)
    return sum(vms.live([dice.choice(vms.STEPS) for _ in range(25)], dice.randrange(1 << 30)) for _ in range(count))


def power_losses(seed: int, count: int) -> int:
    lost = 0
    while lost < count:
        with tempfile.TemporaryDirectory(prefix="tt-power-") as folder:
            lost += power.live(Path(folder) / "life", seed + lost, losses=LOSSES_PER_LIFE)
    return lost


def kills(seed: int, count: int) -> int:
    with tempfile.TemporaryDirectory(prefix="tt-backups-") as folder:
        return campaign(Path(folder), seed=seed, rounds=-(-count // 2))


def played(act: Callable[[], int]) -> dict[str, object]:
    """Return what a part did, and what was wrong."""
    began, done, problem = time.monotonic(), 0, ""
    try:
        done = act()
    except Exception:
        problem = traceback.format_exc().replace(f"{Path(__file__).resolve().parents[2]}/", "")  # no path of a machine
    return {"compared": done, "seconds": round(time.monotonic() - began), "problem": problem}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--histories", type=int, default=300, help="of repositories, and of vms")
    parser.add_argument("--losses", type=int, default=2000, help="of power")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the report goes")
    asked = parser.parse_args()
    began = datetime.now(UTC)
    parts = {
        "kills": played(lambda: kills(asked.seed, asked.kills)),
        "repositories": played(lambda: repository_histories(asked.seed, asked.histories)),
        "vms": played(lambda: vm_histories(asked.seed, asked.histories)),
        "power": played(lambda: power_losses(asked.seed, asked.losses)),
    }
    report = {
        "began": began.isoformat(),
        "commit": current_commit(),
        "seed": asked.seed,
        "kills": asked.kills,
        "histories": asked.histories,
        "losses": asked.losses,
        "parts": parts,
    }
    asked.evidence.mkdir(exist_ok=True, parents=True)
    path = asked.evidence / f"backups-{began:%Y-%m-%d-%H%M%S}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))  # noqa: T201
    return 1 if any(part["problem"] for part in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""The simulated fleet that several benches share: a thousand hosts, a pool that all of them see, a network, an image.

Real processes of the control plane over SQLite, real gRPC with mutual TLS, the real servicer; only the hypervisor is simulated.
`TRIMTAB_BENCH_FLEET` names a directory to keep it in between runs; else it is made in a temporary one and removed.
"""

import os
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.accounts import clean_up_when_told_to_end
from trimtab_lab.commands import own_programs
from trimtab_lab.simulated import SimulatedLab

HOSTS = 1000
POOL, NETWORK = "bench", "bench"
IMAGE_BYTES = 64 << 10
# Hosts look at themselves anew each 30 s.
REST_TIMEOUT_S, POLL_S = 120.0, 1.0
SETTINGS = {
    # The bench is one user; what it may ask for is not what is measured.
    "TRIMTAB_RATE_LIMIT_PER_S": "100000",
}


@contextmanager
def simulated_fleet(hosts: int = HOSTS) -> Iterator[SimulatedLab]:
    """Bring the fleet up, ready for vms, and end it."""
    clean_up_when_told_to_end()
    kept = os.environ.get("TRIMTAB_BENCH_FLEET", "")
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as temporary:
        lab = SimulatedLab(Path(kept or temporary) / "fleet", settings=SETTINGS)
        try:
            lab.start_controller()
            lab.start_hosts(hosts)
            _prepare(lab, Path(temporary))
            yield lab
        finally:
            if kept:
                lab.stop()
            else:
                lab.remove()


def trimtab(lab: SimulatedLab, *arguments: str) -> str:
    """Run the CLI as a user would and return what it printed."""
    finished = subprocess.run(
        [str(own_programs() / "trimtab"), *arguments],
        env={**os.environ, **lab.cli_environment()},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if finished.returncode:
        raise SystemExit(f"trimtab {' '.join(arguments)} ended with {finished.returncode}: {finished.stderr[:500]}")
    return finished.stdout


def image_of(lab: SimulatedLab) -> str:
    """Return the image's name. What simulated hosts store ends with their process, so each gets one of its own."""
    return f"bench-{lab.fleet_process_id}"


def _prepare(lab: SimulatedLab, directory: Path) -> None:
    """Make pool, network and image where they are not there yet."""
    began_at = datetime.now(UTC).replace(tzinfo=None).isoformat(" ")
    is_new = POOL not in trimtab(lab, "pool", "list", "-o", "name").split()
    if is_new:
        trimtab(lab, "pool", "create", POOL, "--path", "/srv/bench-vms", "--shared", "--wait")
    if NETWORK not in trimtab(lab, "network", "list", "-o", "name").split():
        trimtab(lab, "network", "create", NETWORK, "--bridge", "br0", "--wait")
    if image_of(lab) not in trimtab(lab, "image", "list", "-o", "name").split():
        file = directory / "base.raw"
        file.write_bytes(bytes(IMAGE_BYTES))
        trimtab(lab, "image", "import", image_of(lab), str(file), "--format", "raw", "--pool", POOL, "--wait")
    if is_new:
        _come_to_rest(lab, began_at)


def _come_to_rest(lab: SimulatedLab, since: str) -> None:
    """Wait until every host has told of its new pool: a thousand inventories that all change at once are no fleet's usual minute."""
    deadline_s = time.monotonic() + REST_TIMEOUT_S
    database = sqlite3.connect(lab.controller_directory / "trimtab.db", timeout=30)
    told = "SELECT count(*) FROM host WHERE deleted_at IS NULL AND inventory_at >= ?"
    try:
        while database.execute(told, (since,)).fetchone()[0] < lab.spec.count:
            if time.monotonic() > deadline_s:
                raise SystemExit(f"hosts did not tell of pool {POOL} within {REST_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
    finally:
        database.close()

"""`make bench`: every benchmark in turn, each against a baseline of the same run; about ten minutes on two cores.

    python -m tests.bench.run [NAME ...]     all of them where none is named

The simulated fleet is brought up once for creates, reads and heartbeats. Real guests need root and are left out without it, which
is said.
"""

import os
import subprocess
import sys
from collections.abc import Callable

from tests.bench import bench_create, bench_reads
from tests.bench.fleet import HOSTS, simulated_fleet

VMS_CREATED, CONNECTIONS = 1000, 32
VMS_READ, READ_S, READERS = 5000, 10.0, 4


def fleet() -> None:
    with simulated_fleet() as lab:
        # Reads first: a fleet that idles before anything was created is what a heartbeat's cost is asked about.
        say(bench_reads.heartbeats(lab, HOSTS))
        say(bench_create.run(lab, count=VMS_CREATED, connections=CONNECTIONS))
        say(bench_reads.run(lab, vms=VMS_READ, seconds=READ_S, readers=READERS))


def lab() -> None:
    if os.geteuid() != 0:
        say("Real guests: left out, they need root")
        return
    # A process of its own: what it leaves when it fails is torn down by its own end.
    subprocess.run([sys.executable, "-m", "tests.bench.bench_lab"], check=True)


def say(text: str) -> None:
    sys.stdout.write(text + "\n\n")
    sys.stdout.flush()


def in_a_process_of_its_own(module: str, *arguments: str) -> Callable[[], None]:
    """Return a bench whose CPU time and memory are nobody else's; it prints its own goals, met or not."""
    command = [sys.executable, "-m", f"tests.bench.{module}", *arguments]
    return lambda: say(f"{' '.join((module, *arguments))}: ended with {subprocess.run(command, check=False).returncode}")


BENCHES: dict[str, Callable[[], None]] = {
    "placement": in_a_process_of_its_own("bench_placement"),
    "durable": in_a_process_of_its_own("bench_placement_durable"),
    "planning": in_a_process_of_its_own("bench_planning"),
    "failover": in_a_process_of_its_own("bench_failover"),
    "backup": in_a_process_of_its_own("bench_backup"),
    "backup-sizes": in_a_process_of_its_own("bench_backup_sizes"),
    "backup-peers": in_a_process_of_its_own("bench_backup_peers"),
    "instant": in_a_process_of_its_own("bench_instant"),
    "clone": in_a_process_of_its_own("bench_clone"),
    "fleet": fleet,
    "lab": lab,
    "failover-lab-power": in_a_process_of_its_own("bench_failover_lab", "20", "power"),
    "failover-lab-lease": in_a_process_of_its_own("bench_failover_lab", "20", "lease"),
}


def main() -> None:
    for name in sys.argv[1:] or BENCHES:
        BENCHES[name]()


if __name__ == "__main__":
    main()

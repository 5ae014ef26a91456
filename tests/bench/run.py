"""`make bench`: every benchmark in turn, each against a baseline of the same run; about ten minutes on two cores.

    python -m tests.bench.run [placement] [fleet] [lab]     all of them where none is named

The simulated fleet is brought up once for creates, reads and heartbeats. Real guests need root and are left out without it, which
is said.
"""

import os
import subprocess
import sys
from collections.abc import Callable

from tests.bench import bench_create, bench_placement, bench_reads
from tests.bench.accounts import table
from tests.bench.fleet import HOSTS, simulated_fleet

VMS_CREATED, CONNECTIONS = 1000, 32
VMS_READ, READ_S, READERS = 5000, 10.0, 4
PLACEMENT_HOSTS, PLACEMENT_REQUESTS, PLACEMENT_SEED = (1_000, 10_000), 400, 7


def placement() -> None:
    results = [bench_placement.measure(hosts, PLACEMENT_REQUESTS, PLACEMENT_SEED) for hosts in PLACEMENT_HOSTS]
    rows = [["hosts", "decision p50, CPU-us", "p99", "plain loop p50, CPU-us", "ratio"]]
    for one in results:
        rows.append(
            [
                str(one[name])
                for name in ("hosts", "decision_cpu_us_p50", "decision_cpu_us_p99", "plain_loop_cpu_us_p50", "ratio_p50")
            ]
        )
    say(table("Placement: one decision with its verdicts kept, against a plain loop over the same hosts", rows))


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


BENCHES: dict[str, Callable[[], None]] = {"placement": placement, "fleet": fleet, "lab": lab}


def main() -> None:
    for name in sys.argv[1:] or BENCHES:
        BENCHES[name]()


if __name__ == "__main__":
    main()

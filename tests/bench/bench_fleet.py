"""Heartbeats, creates and reads on simulated fleets: `bench_create` and `bench_reads` on no more fleets than they need.

    python -m tests.bench.bench_fleet

Goals: theirs.
"""

import sys

from tests.bench import bench_create, bench_reads
from tests.bench.fleet import HOSTS, simulated_fleet
from tests.bench.goals import Goal, end

VMS_CREATED, CONNECTIONS = 1000, 32
VMS_READ, READ_S, READERS = 5000, 10.0, 4


def goals_of(created: bench_create.Outcome, read: bench_reads.Figures) -> list[Goal]:
    return [*bench_create.goals_of(created), *bench_reads.goals_of(read)]


def say(text: str) -> None:
    sys.stdout.write(text + "\n\n")
    sys.stdout.flush()


def main() -> None:
    with simulated_fleet() as lab:
        # Before anything was created: a fleet that idles is what a heartbeat's cost is asked about.
        say(bench_reads.heartbeats(lab, HOSTS))
        created, report = bench_create.run(lab, count=VMS_CREATED, connections=CONNECTIONS)
        say(report)
    with simulated_fleet(bench_reads.HOSTS) as lab:
        read, report = bench_reads.run(lab, vms=VMS_READ, seconds=READ_S, readers=READERS)
        say(report)
    end(goals_of(created, read))


if __name__ == "__main__":
    main()

"""`make bench`: every benchmark in turn, each against a baseline of the same run; about an hour on two cores, half of it
losses of real hosts.

    python -m tests.bench.run [NAME ...]     all of them where none is named

Creates and heartbeats are measured on a thousand simulated hosts, reads on as many as 5,000 vms have. Real guests need root: without
it those benches say so. Ends with 1, after all others, where a goal was not met or could not be measured, and says of which.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence

BENCHES: dict[str, tuple[str, ...]] = {
    "placement": ("bench_placement",),
    "durable": ("bench_placement_durable",),
    "planning": ("bench_planning",),
    "failover": ("bench_failover",),
    "backup": ("bench_backup",),
    "backup-sizes": ("bench_backup_sizes",),
    "backup-peers": ("bench_backup_peers",),
    "instant": ("bench_instant",),
    "clone": ("bench_clone",),
    "fleet": ("bench_fleet",),
    "lab": ("bench_lab",),
    "failover-lab-power": ("bench_failover_lab", "20", "power"),
    "failover-lab-lease": ("bench_failover_lab", "20", "lease"),
    "failover-lab-beacon": ("bench_failover_lab", "20", "beacon"),
}
"""Module and arguments. Each is a process of its own, whose CPU time and memory are nobody else's, and whose leavings its own end
tears down. It prints its own goals, and ends with 1 where one is not met."""


def say(text: str) -> None:
    sys.stdout.write(text + "\n\n")
    sys.stdout.flush()


def missed(commands: Mapping[str, Sequence[str]]) -> list[str]:
    """Run each to its end; return the names of those that ended with anything but 0."""
    names = []
    for name, command in commands.items():
        code = subprocess.run(command, check=False).returncode
        say(f"{name}: ended with {code}")
        if code:
            names.append(name)
    return names


def main() -> None:
    commands = {name: [sys.executable, "-m", f"tests.bench.{module}", *rest] for name, (module, *rest) in BENCHES.items()}
    if ill := missed({name: commands[name] for name in sys.argv[1:] or commands}):
        sys.exit(f"not met: {', '.join(ill)}")


if __name__ == "__main__":
    main()

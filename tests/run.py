"""`make test`: everything, in an order that leaves neither of two processors idle.

Labs wait most of their time, for guests that boot and leases that run out. Beside them runs, with what processor time they leave over,
the matrix of faults of every saga: by far the most to compute, and on a virtual clock, so that being slowed down changes nothing for
it. What keeps an eye on real time runs before, by itself. The longest stories of real hosts are `soak.real_hosts`' to play.

Real guests without KVM, and real clocks, on two processors that all of it shares meet what no operator's host does. So a test or two that
failed there are played once more, with nothing beside them: what fails again fails the run, what passes then is told, and is to be
understood by whoever reads it. The matrix has a clock of its own: what fails there has failed.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

PATIENT = "tests/operations/test_every_saga.py"
ON_HOSTS = ("tests/lab", "tests/contract")
"""Where tests marked `lab` may be; to collect all others too would cost each worker of the labs a third of a minute."""
OF_HOSTS = "lab and not soak"
LOW_PRIORITY = 19
SOME_FAILED = 1
"""pytest's own word for it; its others are of runs that did not come to their end."""
LABS, WORKERS = "2", "2"
DRAWN_BY = "7"
PLAYED_AGAIN = 3
"""More than so many are no accident."""


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *arguments]


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def hurry(group: int) -> None:
    """Give every process of the group its usual priority back, where we may."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PGRP, group, 0)


def run(name: str, *arguments: str) -> int:
    started_s = time.monotonic()
    code = subprocess.run(pytest(*arguments), check=False).returncode
    tell(f"-- {name}: {time.monotonic() - started_s:.0f} s, exit {code}")
    return code


def run_twice(name: str, marks: str, paths: Sequence[str], *options: str, between: Callable[[], None] = lambda: None) -> int:
    """Run tests; 0 too where those of a few files in which some failed pass by themselves. `between`: what is waited for before that."""
    with TemporaryDirectory(prefix="trimtab-tests-") as directory:
        cache = f"--override-ini=cache_dir={directory}"
        code = run(name, cache, *options, "-m", marks, *paths)
        between()
        failed: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            failed = sorted(json.loads((Path(directory) / "v/cache/lastfailed").read_text()))
        if code != SOME_FAILED or not 0 < len(failed) <= PLAYED_AGAIN:
            return code
    files = sorted({test.partition("::")[0] for test in failed})  # whole: many tell one story, in order
    again = run("the files of what failed there, by themselves", "-m", marks, *files)
    if again == 0:
        tell("\n".join(["-- FAILED BESIDE OTHERS, passed by itself; to be understood:", *(f"--   {test}" for test in failed)]))
    return again


def main() -> int:
    # Every lab starts programs by the dozen: what one has compiled, the next need not compile again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # The campaign of `make soak` goes through all of them; here it is the same one until somebody asks for another.
    seed = os.environ.setdefault("TRIMTAB_LOSS_SEED", DRAWN_BY)
    tell(f"-- one loss of a host is drawn by TRIMTAB_LOSS_SEED={seed}")
    codes = [run_twice("what needs no host", "not lab", ["tests"], f"--ignore={PATIENT}", "-n", WORKERS)]
    with TemporaryDirectory(prefix="trimtab-tests-") as directory:
        told = Path(directory) / "operations"
        with told.open("w") as output:
            beside = subprocess.Popen(
                ["nice", "-n", str(LOW_PRIORITY), *pytest("-q", "-n", WORKERS, "-m", "not lab", PATIENT)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        def end_the_matrix() -> None:
            hurry(beside.pid)
            codes.append(beside.wait())

        try:
            options = ("-n", LABS, "--durations=25")
            codes.append(run_twice("real hosts", OF_HOSTS, ON_HOSTS, *options, between=end_the_matrix))
        finally:
            beside.terminate()
            beside.wait()
        tell(told.read_text()[-200_000:] if codes[1] else told.read_text().splitlines()[-1])
    tell(f"-- {'all passed' if not any(codes) else f'FAILED: exit codes {codes}'}")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())

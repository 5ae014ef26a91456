"""`make test`: everything, in an order that leaves neither of two processors idle.

Labs wait most of their time, for guests that boot and leases that run out. Beside them runs, with what processor time they leave over,
the matrix of faults of every saga: by far the most to compute, and on a virtual clock, so that being slowed down changes nothing for
it. What keeps an eye on real time runs before, by itself. The longest stories of real hosts are `soak.real_hosts`' to play.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

PATIENT = "tests/operations/test_every_saga.py"
ON_HOSTS = ("tests/lab", "tests/contract")
"""Where tests marked `lab` may be; to collect all others too would cost each worker of the labs a third of a minute."""
LOW_PRIORITY = 19
LABS, WORKERS = "2", "2"
DRAWN_BY = "7"


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


def main() -> int:
    # Every lab starts programs by the dozen: what one has compiled, the next need not compile again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # The campaign of `make soak` goes through all of them; here it is the same one until somebody asks for another.
    seed = os.environ.setdefault("TRIMTAB_LOSS_SEED", DRAWN_BY)
    tell(f"-- one loss of a host is drawn by TRIMTAB_LOSS_SEED={seed}")
    codes = [run("what needs no host", "-n", WORKERS, "-m", "not lab", "tests", f"--ignore={PATIENT}")]
    with TemporaryDirectory(prefix="trimtab-tests-") as directory:
        told = Path(directory) / "operations"
        with told.open("w") as output:
            beside = subprocess.Popen(
                ["nice", "-n", str(LOW_PRIORITY), *pytest("-q", "-n", WORKERS, "-m", "not lab", PATIENT)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            codes.append(run("real hosts", "-n", LABS, "--durations=25", "-m", "lab and not soak", *ON_HOSTS))
            hurry(beside.pid)
            codes.append(beside.wait())
        finally:
            beside.terminate()
            beside.wait()
        tell(told.read_text()[-200_000:] if codes[-1] else told.read_text().splitlines()[-1])
    tell(f"-- {'all passed' if not any(codes) else f'FAILED: exit codes {codes}'}")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())

"""`make test`: everything, in an order that leaves neither of two processors idle.

Labs wait most of their time, for guests that boot and leases that run out. Beside them runs, with what processor time they leave over,
the matrix of faults of every saga: by far the most to compute, and on a virtual clock, so that being slowed down changes nothing for
it. What keeps an eye on real time runs before, by itself.
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
LOW_PRIORITY = 10
LABS, WORKERS = "2", "2"


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *arguments]


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def hurry(process_id: int) -> None:
    """Give every thread of the process its usual priority back, where we may."""
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{process_id}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)


def run(name: str, *arguments: str) -> int:
    started_s = time.monotonic()
    code = subprocess.run(pytest(*arguments), check=False).returncode
    tell(f"-- {name}: {time.monotonic() - started_s:.0f} s, exit {code}")
    return code


def main() -> int:
    # Every lab starts programs by the dozen: what one has compiled, the next need not compile again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    codes = [run("what needs no host", "-n", WORKERS, "-m", "not lab", "tests", f"--ignore={PATIENT}")]
    with TemporaryDirectory(prefix="trimtab-tests-") as directory:
        told = Path(directory) / "operations"
        with told.open("w") as output:
            beside = subprocess.Popen(
                ["nice", "-n", str(LOW_PRIORITY), *pytest("-q", "-m", "not lab", PATIENT)],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            codes.append(run("real hosts", "-n", LABS, "-m", "lab", *ON_HOSTS))
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

"""The tests on real hosts that are too long for `make test`: whole faults, whole installations, whole stories.

    python -m tests.soak.real_hosts [--every] [FILE ...]        as root; two labs at a time

They are marked `soak`, and are told from those of `make test` by nothing but the time they take; `--every` plays those too. What passed,
what failed and how long each took goes to tests/evidence.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.run import LABS, ON_HOSTS, pytest
from tests.soak.evidence import EVIDENCE, REPOSITORY, current_commit

LONGEST_S = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class Played:
    """One test that was played."""

    file: str
    name: str
    seconds: float
    problem: str
    """'' for one that passed."""


def played(results: Path) -> list[Played]:
    """Return what JUnit's file says, in its order."""
    found = []
    for case in xml.parse(results).getroot().iter("testcase"):
        problems = [child.get("message", "") for child in case if child.tag in ("failure", "error", "skipped")]
        file = case.get("classname", "").replace(".", "/") + ".py"
        found.append(Played(file, case.get("name", ""), round(float(case.get("time", "0"))), "; ".join(problems)[:500]))
    return found


def write_report(tests: list[Played], directory: Path, *, began: datetime, commit: str, seconds: float) -> Path:
    """Write both forms; return the path of the one for people."""
    failed = [test for test in tests if test.problem]
    name = f"real-hosts-{began:%Y-%m-%d-%H%M%S}"
    document = {"began": began.isoformat(timespec="seconds"), "commit": commit, "seconds": round(seconds)}
    directory.mkdir(exist_ok=True, parents=True)
    (directory / f"{name}.json").write_text(json.dumps({**document, "tests": [asdict(test) for test in tests]}, indent=1) + "\n")
    path = directory / f"{name}.md"
    lines = [
        f"# Long tests on real hosts, {began:%Y-%m-%d %H:%M} UTC",
        "",
        f"Commit `{commit}`, two labs at a time: {len(tests)} tests in {seconds / 60:.0f} minutes.",
        "",
        f"**{len(failed)} failed:**" if failed else "**All passed.**" if tests else "**Nothing was played.**",
        "",
        *[f"- `{test.file}::{test.name}`: {test.problem.splitlines()[0]}" for test in failed],
        "",
        "| test | seconds |",
        "| --- | ---: |",
        *[
            f"| `{Path(test.file).stem}` {test.name.removeprefix('test_').replace('_', ' ')} | {test.seconds:.0f} |"
            for test in tests
        ],
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description="The long tests on real hosts.")
    parser.add_argument("files", nargs="*", default=ON_HOSTS, help="where to look for them")
    parser.add_argument("--every", action="store_true", help="those of `make test` too")
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the report goes")
    asked = parser.parse_args()
    began, commit = datetime.now(UTC), current_commit()
    with tempfile.TemporaryDirectory(prefix="trimtab-soak-") as directory:
        results = Path(directory) / "results.xml"
        which = "lab" if asked.every else "lab and soak"
        command = pytest("-n", LABS, "-m", which, f"--junitxml={results}", *asked.files)
        code = subprocess.run(command, cwd=REPOSITORY, check=False, timeout=LONGEST_S).returncode
        tests = played(results)
    seconds = (datetime.now(UTC) - began).total_seconds()
    path = write_report(tests, asked.evidence, began=began, commit=commit, seconds=seconds)
    sys.stdout.write(f"written: {path}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

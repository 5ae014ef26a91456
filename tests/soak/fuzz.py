"""Generated requests to every route of the API on SQLite and on PostgreSQL: `tests/api/test_fuzz.py`, with a dated report.

    python -m tests.soak.fuzz [--examples 100]        one worker for each database; exit status 1 where an answer was wrong

For each database is told how many requests were answered how. What was wrong is in the report and above it, in pytest's words.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.run import pytest
from tests.soak.evidence import EVIDENCE, REPOSITORY, current_commit

FUZZ = "tests/api/test_fuzz.py"
DATABASES = ("sqlite", "postgres")
LONGEST_S = 4 * 3600.0


@dataclass(slots=True)
class Played:
    """What one database's routes answered."""

    database: str
    routes: int = 0
    seconds: float = 0
    answers: dict[str, int] = field(default_factory=dict)
    """How many by status."""
    problems: list[str] = field(default_factory=list)

    def of_class(self, first: str) -> int:
        return sum(count for status, count in self.answers.items() if status.startswith(first))


def played(results: Path) -> list[Played]:
    """Return what JUnit's file says, for each database."""
    found = {database: Played(database) for database in DATABASES}
    for case in xml.parse(results).getroot().iter("testcase"):
        name = case.get("name", "")
        of = found[next(database for database in DATABASES if name.endswith(f"[{database}]"))]
        of.seconds += float(case.get("time", "0"))
        told = case.find("properties/property[@name='answers']")
        if told is not None:
            of.routes += 1
            of.answers = dict(sorted((Counter(of.answers) + Counter(json.loads(told.get("value", "{}")))).items()))
        problems = [child.get("message", "") for child in case if child.tag in ("failure", "error", "skipped")]
        of.problems += [f"{name}: {problem}"[:500] for problem in problems]
    return list(found.values())


def write_report(databases: list[Played], directory: Path, *, began: datetime, commit: str, examples: int, code: int) -> Path:
    """Write both forms; return the path of the one for people."""
    stem = directory / f"fuzz-{began:%Y-%m-%d-%H%M%S}"
    document = {"began": began.isoformat(timespec="seconds"), "commit": commit, "examples": examples, "pytest_exit": code}
    directory.mkdir(exist_ok=True, parents=True)
    stem.with_suffix(".json").write_text(
        json.dumps({**document, "databases": [asdict(one) for one in databases]}, indent=1) + "\n"
    )
    failed = [f"- {one.database}, `{problem.splitlines()[0]}`" for one in databases for problem in one.problems]
    lines = [
        f"# Generated requests to every route, {began:%Y-%m-%d %H:%M} UTC",
        "",
        f"Commit `{commit}`, up to {examples} random requests for each route beside those that schemathesis makes of bounds and examples;"
        " each answer is none of 5xx, and of a status, a media type and a shape that the OpenAPI document has for that route.",
        "",
        f"**{len(failed)} failed:**" if failed else "**All passed.**" if code == 0 else f"**pytest ended with {code}.**",
        "",
        *failed,
        *([""] if failed else []),
        "| database | routes | requests | 2xx | 4xx | 5xx | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *[
            f"| {one.database} | {one.routes} | {sum(one.answers.values())} | {one.of_class('2')} | {one.of_class('4')} "
            f"| {one.of_class('5')} | {one.seconds:.0f} |"
            for one in databases
        ],
    ]
    path = stem.with_suffix(".md")
    path.write_text("\n".join(lines) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="random requests for each route")
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the report goes")
    asked = parser.parse_args()
    began, commit = datetime.now(UTC), current_commit()
    with tempfile.TemporaryDirectory(prefix="trimtab-soak-") as directory:
        results = Path(directory) / "results.xml"
        command = pytest("-q", "-n", str(len(DATABASES)), f"--junitxml={results}", FUZZ)
        environment = {**os.environ, "TRIMTAB_FUZZ_EXAMPLES": str(asked.examples)}
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False, timeout=LONGEST_S).returncode
        databases = played(results)
    path = write_report(databases, asked.evidence, began=began, commit=commit, examples=asked.examples, code=code)
    sys.stdout.write(f"written: {path}\n{path.read_text()}")
    return code


if __name__ == "__main__":
    sys.exit(main())

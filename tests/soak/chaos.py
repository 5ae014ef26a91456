"""`python -m tests.soak.chaos --seed N --operations 500 --database sqlite|postgres`: a long fault campaign and its dated report.

Exit status 1 where anything was lost, done twice, did not end or was left behind. Run by `make soak`; a short one is in the tests.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.databases import PostgresServer
from tests.soak.campaign import Campaign, Verdict, Wishes, world
from tests.soak.controlplane import ControlPlane, Shape
from tests.soak.evidence import EVIDENCE, current_commit
from tests.soak.world import WorldServer


@contextmanager
def campaign(directory: Path, wishes: Wishes, shape: Shape, *, database_url: str = "") -> Iterator[Campaign]:
    """Give a campaign that is ready to run, and end all of its processes. `database_url` '': SQLite in the directory."""
    fleet = world()
    server = WorldServer(fleet, directory / "world.sock")
    plane = ControlPlane(directory, shape, fleet, directory / "world.sock", database_url)
    try:
        yield Campaign(plane, fleet, wishes)
    finally:
        plane.stop()
        server.close()
        fleet.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument("--operations", type=int, default=500)
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the report goes")
    parser.add_argument("--keep", action="store_true", help="keep the directory with logs and journals")
    arguments = parser.parse_args()
    wishes = Wishes(seed=arguments.seed if arguments.seed is not None else int(time.time()), operations=arguments.operations)
    began = datetime.now(UTC)
    directory = Path(tempfile.mkdtemp(prefix="tt-chaos-"))
    try:
        verdict = _run(directory, wishes, arguments.database)
    finally:
        if not arguments.keep:
            shutil.rmtree(directory, ignore_errors=True)
    paths = write_report(verdict, wishes, arguments.evidence, database=arguments.database, began=began)
    print(_markdown(verdict, wishes, database=arguments.database, began=began))  # noqa: T201
    print(f"written: {', '.join(str(path) for path in paths)}")  # noqa: T201
    return 1 if verdict.violations else 0


def _run(directory: Path, wishes: Wishes, database: str) -> Verdict:
    if database == "sqlite":
        with campaign(directory, wishes, Shape()) as ready:
            return ready.run()
    server = PostgresServer(directory)
    try:
        with campaign(directory, wishes, Shape(), database_url=server.new_database()) as ready:
            return ready.run()
    finally:
        server.stop()


def write_report(verdict: Verdict, wishes: Wishes, directory: Path, *, database: str, began: datetime) -> list[Path]:
    """Write the report, as JSON and for people; return the paths."""
    name = f"chaos-{database}-{began:%Y-%m-%d-%H%M%S}"
    document = {"began": began.isoformat(), "commit": current_commit(), "database": database, **_plain(wishes), **_plain(verdict)}
    paths = [directory / f"{name}.json", directory / f"{name}.md"]
    directory.mkdir(exist_ok=True, parents=True)
    paths[0].write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    paths[1].write_text(_markdown(verdict, wishes, database=database, began=began) + "\n")
    return paths


def _plain(value: Any) -> dict[str, Any]:
    found = {one.name: getattr(value, one.name) for one in fields(value)}
    return {name: dict(content) if isinstance(content, Counter) else content for name, content in found.items()}


def _markdown(verdict: Verdict, wishes: Wishes, *, database: str, began: datetime) -> str:
    def table(title: str, counts: dict[str, int]) -> list[str]:
        rows = [f"| {name} | {count} |" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
        return [f"| {title} | count |", "| --- | ---: |", *rows, ""]

    lines = [
        f"# Fault campaign on {database}, {began:%Y-%m-%d %H:%M} UTC",
        "",
        f"Commit `{current_commit()}`, seed {wishes.seed}. {verdict.accepted} operations were accepted in {verdict.seconds_under_load:.0f} s "
        f"under faults; all had ended {verdict.seconds_to_quiesce:.0f} s after the last fault began. {verdict.takeovers} were driven by more "
        f"than one driver, {verdict.cancels} were asked to cancel, {verdict.retried_by_hand} times an operator had to retry.",
        "",
        "**Nothing was lost, done twice or left behind.**" if not verdict.violations else "**It failed:**",
        "",
        *[f"- {violation}" for violation in verdict.violations],
        *table("ended as", verdict.ended),
        *table("kind", verdict.kinds),
        *table("fault", verdict.faults),
        *table("error of an operation that was undone", verdict.errors),
        *table("request refused", verdict.refused),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Play a folder of scenario files and print pass or fail per file: `python -m tests.scenarios.run DIR`.

The exit status is 0 when every file that binds passes. A sentence in `must` that nobody has mapped is a failure, not a skip.
"""

import logging
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from tests.scenarios import ends, reference
from tests.scenarios.musts import MUSTS
from tests.scenarios.played import Played
from tests.scenarios.schema import load
from trimtab_controller.core.failover import FailoverSettings


def is_scenario(path: Path) -> bool:
    return path.suffix == ".json" and path.name != "index.json"


def check(scenario: Mapping[str, Any], settings: FailoverSettings | None = None) -> str:
    """Play one scenario and check everything that binds; return '' or why it does not bind. AssertionError where it fails."""
    expected = scenario["expected"]
    played = Played(scenario, settings)
    if "end" in expected:
        for variant in expected.get("variants", ["as-written"]):
            ends.compare(played.run(variant), expected["end"])
        return ""
    if "must" in expected:
        unknown = [sentence for sentence in expected["must"] if sentence not in MUSTS]
        assert not unknown, f"no assertion is mapped to: {unknown}"
        if not any(one["t"] == "every_step" for one in scenario["timeline"]):
            played.run()
        for sentence in expected["must"]:
            MUSTS[sentence](played)
        return ""
    excluded = reference.exclusion(scenario)
    if not excluded:
        reference.compare(played.run())
    return excluded


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(directory: Path) -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    failed = played = excluded = 0
    for path in sorted(one for one in directory.iterdir() if is_scenario(one)):
        began = time.monotonic()
        try:
            why = check(load(path))
        except Exception as error:
            failed += 1
            text = str(error).strip().splitlines()[0] if str(error).strip() else traceback.format_exc().strip().splitlines()[-3]
            say(f"FAIL      {path.stem}: {type(error).__name__}: {text[:300]}")
            continue
        if why:
            excluded += 1
            say(f"excluded  {path.stem}: {why}")
        else:
            played += 1
            say(f"pass      {path.stem} ({time.monotonic() - began:.1f} s)")
    say(f"{played} passed, {failed} failed, {excluded} excluded")
    return 1 if failed or not played else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m tests.scenarios.run DIR" + "\n")
        sys.exit(2)
    sys.exit(main(Path(sys.argv[1])))

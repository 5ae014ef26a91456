"""Where campaigns leave their dated reports, and which code they were about."""

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
EVIDENCE = REPOSITORY / "tests" / "evidence"


def current_commit() -> str:
    """Return the commit that is checked out, "unknown" outside of a clone."""
    named = ["git", "rev-parse", "--short", "HEAD"]
    finished = subprocess.run(named, cwd=REPOSITORY, capture_output=True, text=True, timeout=10, check=False)
    return finished.stdout.strip() or "unknown"

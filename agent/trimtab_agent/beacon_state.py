"""What agent, beacon and warden leave for one another on /run about the second channel. Memory only; standard library only."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TASK_NAME = "beacon.json"
STATE_NAME = "beacon.state"


@dataclass(frozen=True, slots=True)
class Task:
    """What the agent wants of the beacon."""

    host_id: str
    boot_id: str
    lease_number: int
    """Of the lease that is renewed; an intent forbids leases up to a number. 0: write and read only, to see whether a slot works."""
    pool_id: str
    pool_path: str
    ttl_s: float
    every_s: float


@dataclass(frozen=True, slots=True)
class State:
    """What the beacon leaves on /run after each round, for an agent that wants to know and for a warden that starts anew."""

    deadline_s: float
    """CLOCK_BOOTTIME until which it renewed; 0: not yet in this boot."""
    renewed_s: float
    """When the round began that renewed last."""
    pool_id: str = ""
    counter: int = 0
    """Of the last beat that was written there; 0: none was."""
    forbidden_lease: int = 0
    """The lease that an intent forbade in the last round; 0: none did."""
    problem: str = ""
    """Why the last round did not renew, '' where it did."""


def write_task(directory: Path, task: Task | None) -> None:
    """Leave the task for the beacon, or take it away."""
    if task is None:
        (directory / TASK_NAME).unlink(missing_ok=True)
        return
    _replace(directory / TASK_NAME, asdict(task))


def read_task(directory: Path) -> Task | None:
    try:
        return Task(**json.loads((directory / TASK_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_state(directory: Path) -> State:
    """Return what the beacon of this boot said last."""
    try:
        return State(**json.loads((directory / STATE_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return State(0.0, float("-inf"))


def write_state(directory: Path, state: State) -> None:
    _replace(directory / STATE_NAME, asdict(state))


def _replace(path: Path, content: dict[str, Any]) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps(content))
    fresh.replace(path)

"""The dated report of a campaign of host losses, as JSON and for people."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from tests.soak.evidence import current_commit


class Loss(Protocol):
    """What a report needs of a round."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    number: int
    fault: str
    hosts: list[str]
    has_beacons: bool
    started_s: dict[str, float]
    counting_s: dict[str, float]
    restarted: list[str]
    took_s: float
    failure: str


L = TypeVar("L", bound=Loss)


@dataclass
class Told(Generic[L]):
    """What a campaign found."""

    seed: int
    is_replicated: bool
    commit: str = field(default_factory=current_commit)
    """What was tested: the one when the campaign began."""
    rounds: list[L] = field(default_factory=list)
    double_runs: list[str] = field(default_factory=list)
    writes: int = 0
    """Lines that guests wrote to their lock-free disks, each of which was judged."""
    struck: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Kinds of faults that there was no time for."""

    def and_of(self, other: "Told[L]") -> "Told[L]":
        """Return what two campaigns at once found together."""
        return replace(
            self,
            rounds=[*self.rounds, *other.rounds],
            double_runs=[*self.double_runs, *other.double_runs],
            writes=self.writes + other.writes,
            struck=[*self.struck, *other.struck],
            left=sorted({*self.left, *other.left}),
        )

    @property
    def failures(self) -> list[str]:
        return [
            f"loss {each.number} ({each.fault} of {', '.join(each.hosts)}): {each.failure}"
            for each in self.rounds
            if each.failure
        ]


def write_report(told: Told[L], directory: Path, *, began: datetime) -> Path:
    """Write both forms; return the path of the one for people."""
    kind = "replicated" if told.is_replicated else "embedded"
    name = f"host-loss-{kind}-{began:%Y-%m-%d-%H%M%S}"
    directory.mkdir(exist_ok=True, parents=True)
    document = {
        "began": began.isoformat(timespec="seconds"),
        "commit": told.commit,
        "double_runs": told.double_runs,
        "failures": told.failures,
        "false_failovers": sum("false failover" in line for line in told.failures),
        "faults": dict(sorted(Counter(each.fault for each in told.rounds).items())),
        "kinds_not_shown": told.left,
        "losses": [asdict(each) for each in told.rounds],
        "seed": told.seed,
        "struck": told.struck,
        "writes_judged": told.writes,
    }
    (directory / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    path = directory / f"{name}.md"
    path.write_text("\n".join(_lines(told, kind, began)) + "\n")
    return path


def _lines(told: Told[L], kind: str, began: datetime) -> list[str]:
    fleet = (
        "five hosts; two engines, two gateways, an api and a worker on PostgreSQL"
        if told.is_replicated
        else "three hosts and the embedded control plane on SQLite"
    )
    false_failovers = sum("false failover" in line for line in told.failures)
    faults = sorted({each.fault for each in told.rounds})
    rows = [_row(fault, [each for each in told.rounds if each.fault == fault]) for fault in faults]
    return [
        f"# Host losses, {kind}, {began:%Y-%m-%d %H:%M} UTC",
        "",
        f"Commit `{told.commit}`, seed {told.seed}: {fleet}; three kept guests that write to lock-free disks, whose server's log of "
        f"{told.writes} lines was judged. {len(told.rounds)} faults; {len(told.double_runs)} double runs, "
        f"{false_failovers} false failovers.",
        "",
        "**Each guest ran in one place, and what had to follow followed.**" if not told.failures else "**It failed:**",
        "",
        *[f"- {line}" for line in [*told.failures, *told.double_runs]],
        "",
        *([f"No time was left for: {', '.join(told.left)}.", ""] if told.left else []),
        "Seconds are from the fault until a guest's disk was opened elsewhere (its boot comes after that), on a machine of two cores "
        "that others used too.",
        "",
        "| fault | times | of these with beacons | failed | guests started anew | started elsewhere after, median | slowest | all well "
        "again after |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
        *(["| struck or refused | times |", "| --- | ---: |"] if told.struck else []),
        *[
            f"| {what.replace('|', '/')} | {count} |"
            for what, count in sorted(Counter(_short(one) for one in told.struck).items())
        ],
    ]


def _row(fault: str, rounds: Sequence[L]) -> str:
    seconds = [one for each in rounds for one in each.started_s.values()]
    median, slowest = (f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}") if seconds else ("", "")
    failed, anew = sum(bool(each.failure) for each in rounds), sum(len(each.restarted) for each in rounds)
    well_s = statistics.median(each.took_s for each in rounds)
    beacons = sum(each.has_beacons for each in rounds)
    return f"| {fault} | {len(rounds)} | {beacons} | {failed} | {anew} | {median} | {slowest} | {well_s:.0f} |"


def _short(what: str) -> str:
    """A refusal is counted whatever its term and time."""
    return "stale leader refused when it went on" if what.startswith("refused") else what

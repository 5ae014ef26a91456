"""Replays a trace file through the scheduler on this machine, without a controller: what `trimtab placement replay` runs.

A trace is CSV, gzipped where its name ends in .gz: `t_s,op,vm,cpu_millis,memory_mib,batch`, op 1 for a creation and 0 for a
deletion, sorted by time. It is the one part of the controller that the command line imports: the scheduler is pure, so a replay
needs no server, no database and no rights.
"""

import csv
import gzip
import time
from pathlib import Path
from typing import IO, Any, cast

from trimtab_controller.core.placement.policies import policy_named
from trimtab_controller.core.placement.replay import Fleet, TraceEvent, peak_bound, run
from trimtab_protos.errors import InvalidRequest

COLUMNS = ("t_s", "op", "vm", "cpu_millis", "memory_mib", "batch")


class ReplayRefused(ValueError):
    """A file that is no trace (says the line and what is wrong with it), or a policy that is none."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def replay(path: Path, *, cpu_millis: int, memory_mib: int, hosts: int | None, policy: str) -> dict[str, Any]:
    """Return the report of a trace on alike hosts of this size, as JSON types.

    `hosts` None: as many as the trace can need, a quarter more than its peak fills if vms could be cut up; those not in use cost
    nothing. ReplayRefused for a file that is no such trace and a policy that is none.
    """
    try:
        chosen = policy_named(policy)
    except InvalidRequest as error:
        raise ReplayRefused(error.code, error.message) from error
    events = read(path)
    size = {"cpu_millis": cpu_millis, "memory_mib": memory_mib}
    count = hosts if hosts is not None else peak_bound(events, **size) * 5 // 4 + 1
    report = run(events, Fleet(count, cpu_millis, memory_mib, chosen), **size, cpu_time_ns=time.process_time_ns)
    return {"trace": path.name, "policy": policy, "hosts": count, **report.as_json()}


def read(path: Path) -> list[TraceEvent]:
    """Return the events of a trace file, in its order. ReplayRefused where a line is none, or time runs backwards."""
    events: list[TraceEvent] = []
    with _open(path) as lines:
        reader = csv.DictReader(lines)
        missing = sorted(set(COLUMNS) - set(reader.fieldnames or ()))
        if missing:
            raise _bad(path, 1, f"its first line must name the columns {','.join(COLUMNS)}; {missing[0]} is missing")
        for line, row in enumerate(reader, start=2):
            event = _event(path, line, row)
            if events and event.t_s < events[-1].t_s:
                raise _bad(path, line, f"t_s {event.t_s} is earlier than the line before")
            events.append(event)
    return events


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return cast(IO[str], gzip.open(path, "rt", newline=""))
    return path.open(newline="")


def _event(path: Path, line: int, row: dict[str, str]) -> TraceEvent:
    try:
        event = TraceEvent(
            float(row["t_s"]), int(row["op"]) == 1, row["vm"], int(row["cpu_millis"]), int(row["memory_mib"]), row["batch"]
        )
    except (TypeError, ValueError) as error:
        raise _bad(path, line, f"{error}") from error
    if event.cpu_millis < 0 or event.memory_mib < 0:
        raise _bad(path, line, "a vm cannot ask for less than nothing")
    return event


def _bad(path: Path, line: int, reason: str) -> ReplayRefused:
    return ReplayRefused("trace-invalid", f"{path.name}, line {line}: {reason}")

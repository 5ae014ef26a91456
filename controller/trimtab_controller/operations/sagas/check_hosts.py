"""host.check: hosts look at the ways to each other, turn by turn, and what is wrong is judged.

| step   | do                                                                                       | undo            |
|--------|------------------------------------------------------------------------------------------|-----------------|
| look   | each turn every host looks at one other, at most 8 at once; what was found is its progress | - it only looks |
| finish | judge                                                                                     | - last          |

Nothing is changed and nothing listens. A host that is not up, or does not answer, is told as such and fails nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trimtab_controller.core import host_check
from trimtab_controller.operations.fan_out import ask_each
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import hosts_read
from trimtab_controller.store.hosts_read import Reached
from trimtab_controller.store.reach import UpHost
from trimtab_protos.errors import TrimtabError
from trimtab_protos.network_messages import Peer, PeerFinding


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """'' looks at all hosts; else at all ways from and to one."""

    host_id: str = ""


def _look(context: Effect[Params]) -> Json | Wait:
    known = {host.id: host for host in context.read(hosts_read.reached)}
    up = [host.id for host in known.values() if host.is_up]
    seen: dict[str, Any] = dict(context.operation.progress or {"turn": 0, "found": []})
    turn, last = int(seen["turn"]), host_check.turns(len(up))
    if turn >= last:
        down = sorted(host.name for host in known.values() if not host.is_up)
        return {"found": seen["found"], "down": down, "hosts": len(up)}
    only = context.params.host_id
    ways = {here: there for here, there in host_check.ring(up, turn).items() if only in {"", here, there}}

    def ask(host: UpHost) -> Json:
        there = known[ways[host.id]]
        peer = Peer(host_id=there.id, agent_address=there.agent_address, migration_address=there.migration_address)
        (finding,) = context.agents.check_peers(host.id, [peer], rate_bytes=host_check.RATE_BYTES)
        return asdict(finding)

    answers = ask_each([UpHost(here, known[here].name) for here in ways], ask)
    found = [_row(known, here, ways[here], answer) for here, answer in answers.items()]
    phase = f"turn {turn + 1} of {last}"
    return Wait(0.0, "the next turn", progress={"turn": turn + 1, "found": [*seen["found"], *found], "phase": phase})


def _row(known: Mapping[str, Reached], here: str, there: str, answer: Json | TrimtabError) -> Json:
    peer = known[there]
    row = {"seen_by": known[here].name, "peer": peer.name, "address": peer.migration_address}
    return {**row, "error": answer.message} if isinstance(answer, TrimtabError) else {**row, "finding": dict(answer)}


def _finish(context: Transaction[Params]) -> Json:
    looked = context.results["look"]
    problems: list[Json] = [
        {"seen_by": "", "peer": name, "kind": "down", "message": "it is not up", "cure": f"trimtab host get {name}"}
        for name in looked["down"]
    ]
    pairs = []
    for row in looked["found"]:
        here, there = str(row["seen_by"]), str(row["peer"])
        if "error" in row:
            message, cure = f"{here} could not look: {row['error']}", f"trimtab host get {here}"
            problems.append({"seen_by": here, "peer": there, "kind": "unknown", "message": message, "cure": cure})
            continue
        finding = PeerFinding(**row["finding"])
        judged = host_check.judge(finding, seen_by=here, peer=there, address=str(row["address"]))
        problems += [asdict(problem) for problem in judged]
        figures = {"mtu": finding.mtu_passed, "rate_bytes_s": finding.rate_bytes_s, "clock_ahead_ms": finding.clock_ahead_ms}
        pairs.append({"seen_by": here, "peer": there, "is_fine": not judged, **figures})
    return {"problems": problems, "pairs": pairs, "hosts": looked["hosts"]}


SAGA = Saga(
    name="host.check",
    version=1,
    params=Params,
    is_exclusive=False,
    steps=(
        effect("look", _look, None, because="it only looks"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
    result=lambda results: results["finish"],
)

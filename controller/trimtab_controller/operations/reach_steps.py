"""Making pools and networks usable on hosts: what `pool.create`, `network.create` and `host.prepare` share.

One host that cannot use a pool is told as that host's state and does not fail the rest; placement then avoids it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from trimtab_controller.core.model import Network, Pool
from trimtab_controller.operations.saga import Effect, Json, Transaction
from trimtab_controller.store import describe, reach
from trimtab_controller.store.reach import UpHost
from trimtab_protos.codec import as_json, from_json
from trimtab_protos.errors import Conflict, TrimtabError
from trimtab_protos.messages import PoolObservation

# The host that wrote the marker names itself in it.
MARKER = "trimtab-shared"


def ensure_pool(context: Effect[Any], pool: Pool, hosts: Sequence[UpHost]) -> dict[str, Json]:
    """Return {host id: {observation} or {problem}}. An unreachable host is a problem of that host."""
    spec = describe.pool_spec(pool)
    found: dict[str, Json] = {}
    for host in hosts:
        key = context.key(subject_id=context.operation.subject_id, part=f"{pool.id}-{host.id}")
        try:
            found[host.id] = {"observation": as_json(context.agents.ensure_pool(host.id, key, spec))}
        except TrimtabError as error:
            found[host.id] = {"problem": error.message}
    return found


def prove_shared(context: Effect[Any], pool: Pool, hosts: Sequence[UpHost], reference: Sequence[UpHost] = ()) -> dict[str, str]:
    """Let one host write a marker and every other read it; return {host id: problem} of those that saw something else.

    `reference`: hosts that are proven already; one of them writes, so that a new host is held against the fleet.
    """
    writers = list(reference) or list(hosts)
    if not writers:
        return {}
    writer = writers[0]
    spec, content = describe.pool_spec(pool), f"{context.operation.id} {writer.id}"
    context.agents.check_marker(writer.id, spec, MARKER, write_content=content)
    problems = {}
    for host in hosts:
        try:
            seen = context.agents.check_marker(host.id, spec, MARKER)
        except TrimtabError as error:
            problems[host.id] = error.message
            continue
        if seen != content:
            problems[host.id] = f"does not see what {writer.name} wrote to {pool.path}: the folder is not shared"
    context.agents.check_marker(writer.id, spec, MARKER, remove=True)
    return problems


def record_pool(context: Transaction[Any], pool_id: str, found: Json, unshared: Json) -> tuple[str, ...]:
    """Record each host's finding; return the ids of the hosts that are ready."""
    ready = []
    for host_id, outcome in found.items():
        problem = outcome.get("problem") or unshared.get(host_id, "")
        observation = from_json(outcome["observation"], PoolObservation) if "observation" in outcome else None
        problem = problem or (observation.problem if observation else "")
        reach.record_pool(context.session, pool_id, host_id, observation=observation, problem=problem, now=context.now)
        if not problem:
            ready.append(host_id)
    return tuple(ready)


def ensure_network(context: Effect[Any], network: Network, hosts: Sequence[UpHost]) -> dict[str, Json]:
    """Return {host id: {problem}}, an empty problem where guests of the host can use the network."""
    found: dict[str, Json] = {}
    for host in hosts:
        key = context.key(subject_id=context.operation.subject_id, part=f"{network.id}-{host.id}")
        spec = context.read(partial(describe.network_spec, network=network, host_id=host.id))
        try:
            is_reachable, problem = context.agents.ensure_network(host.id, key, spec)
            found[host.id] = {"problem": "" if is_reachable else problem or "not reachable"}
        except TrimtabError as error:
            found[host.id] = {"problem": error.message}
    return found


def refuse_if_none(what: str, name: str, problems: Json, names: Json) -> None:
    """Raise Conflict with each host's reason where no host can use it; no host at all is fine: those that join later will try."""
    if problems and all(problems.values()):
        reasons = "; ".join(f"{names.get(host_id, host_id)}: {problem}" for host_id, problem in sorted(problems.items()))
        raise Conflict(f"{what}-unusable", f"no host can use {what} {name}: {reasons}"[:1000])

"""Making pools and networks usable on hosts: what pool.create, network.create, their deletion and host.prepare share.

One host that cannot use a pool is told as that host's state and does not fail the rest; placement then avoids it. A host that does
not answer is asked again a few times and then left `unknown`: it is prepared when it is back.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from trimtab_controller.core.model import Network, Pool
from trimtab_controller.operations.fan_out import ask_each
from trimtab_controller.operations.saga import Effect, Json, Transaction
from trimtab_controller.store import describe, hosts, reach
from trimtab_controller.store.host_reports import NOT_SHARED
from trimtab_controller.store.reach import FAILED, READY, UNKNOWN, UNRESPONSIVE, UpHost
from trimtab_protos.codec import as_json, from_json
from trimtab_protos.errors import Conflict, TrimtabError, Unavailable
from trimtab_protos.messages import PoolObservation

# Tries of a step before hosts that do not answer are left out.
PATIENCE = 2

Found = dict[str, Json]
"""By host id: {state, problem} and, of a pool that is ready, {observation}."""


def ensure_pool(context: Effect[Any], pool: Pool, hosts: Sequence[UpHost], *, subject_id: str) -> Found:
    """Make the pool usable on these hosts."""
    spec = describe.pool_spec(pool)

    def ask(host: UpHost) -> Json:
        seen = context.agents.ensure_pool(host.id, context.key(subject_id=subject_id, part=pool.id), spec)
        if seen.problem or not seen.is_responsive:
            return {
                "state": UNRESPONSIVE if seen.is_hung else FAILED,
                "problem": seen.problem or "the folder does not answer",
            }
        return {"state": READY, "problem": "", "observation": as_json(seen)}

    return _ask_all(context, hosts, ask)


def ensure_network(context: Effect[Any], network: Network, hosts: Sequence[UpHost], *, subject_id: str) -> Found:
    """Make the network usable for guests of these hosts."""

    def ask(host: UpHost) -> Json:
        spec = context.read(partial(describe.network_spec, network=network, host_id=host.id))
        key = context.key(subject_id=subject_id, part=network.id)
        is_reachable, problem = context.agents.ensure_network(host.id, key, spec)
        return {"state": READY if is_reachable else FAILED, "problem": "" if is_reachable else problem or "not reachable"}

    return _ask_all(context, hosts, ask)


def remove_everywhere(context: Effect[Any], remove: Callable[[UpHost], None]) -> Json:
    """Let every host that is up forget something; return who did, and whom that did not reach, since they are told when they come back."""
    hosts = context.read(reach.up_hosts)
    answers = ask_each(hosts, remove)
    errors = {host_id: answer for host_id, answer in answers.items() if isinstance(answer, TrimtabError)}
    for error in errors.values():
        if not error.retryable or context.operation.attempts < PATIENCE:
            raise error
    return {"unreached": sorted(errors), "told": sorted(answers.keys() - errors.keys())}


def untold(context: Transaction[Any], removed: Json) -> tuple[str, ...]:
    """Return the hosts of the fleet that have yet to forget what `remove_everywhere` removed: silent ones and those that were not up."""
    return tuple(sorted(hosts.member_ids(context.session) - set(removed["told"]))) if "told" in removed else ()


def prove_shared(context: Effect[Any], pool: Pool, writer: UpHost, readers: Sequence[UpHost]) -> Mapping[str, str]:
    """Let one host write a marker and the others read it; return {host id: problem} of those that saw something else.

    Raises Unavailable where a host does not answer: neither shared nor not shared is proven then.
    """
    if pool.kind in describe.BLOCK_KINDS:
        return {}  # a target or a cluster is one storage by what it is called, and takes no marker
    spec, content = describe.pool_spec(pool), f"{context.operation.id} {writer.id}"
    # A name of its own, so that nothing a host has cached of an earlier look can answer for it.
    marker = f"shared-{context.operation.id}-{context.operation.turn}"
    context.agents.check_marker(writer.id, spec, marker, write_content=content)
    try:
        seen = ask_each(readers, lambda reader: context.agents.check_marker(reader.id, spec, marker))
    finally:
        context.agents.check_marker(writer.id, spec, marker, remove=True)
    for answer in seen.values():
        if isinstance(answer, TrimtabError):
            raise answer
    problem = f"{NOT_SHARED}: it does not see what {writer.name} wrote to {pool.path}"
    return {host_id: problem for host_id, answer in seen.items() if answer != content}


def record_pool(context: Transaction[Any], pool_id: str, found: Found, unshared: Mapping[str, str]) -> tuple[str, ...]:
    """Record each host's finding; return the ids of the hosts that are ready."""
    ready = []
    for host_id, outcome in sorted(found.items()):
        problem = unshared.get(host_id, "") or str(outcome["problem"])
        state = FAILED if unshared.get(host_id) else str(outcome["state"])
        observation = from_json(outcome["observation"], PoolObservation) if "observation" in outcome else None
        reach.record_pool(
            context.session, pool_id, host_id, state=state, problem=problem, observation=observation, now=context.now
        )
        if state == READY:
            ready.append(host_id)
    return tuple(ready)


def record_network(context: Transaction[Any], network_id: str, found: Found) -> None:
    for host_id, outcome in sorted(found.items()):
        reach.record_network(
            context.session,
            network_id,
            host_id,
            state=str(outcome["state"]),
            problem=str(outcome["problem"]),
            now=context.now,
        )


def refuse_if_none(what: str, name: str, found: Found, hosts: Sequence[UpHost]) -> None:
    """Raise, with each host's reason, where no host can use it; no host at all is fine: those that join later will try."""
    if not found or any(outcome["state"] == READY for outcome in found.values()):
        return
    names = {host.id: host.name for host in hosts}
    reasons = "; ".join(f"{names.get(host_id, host_id)}: {outcome['problem']}" for host_id, outcome in sorted(found.items()))
    refusal = Unavailable if all(outcome["state"] == UNKNOWN for outcome in found.values()) else Conflict
    raise refusal(f"{what}-unusable", f"no host can use {what} {name}: {reasons}"[:1000])


def _ask_all(context: Effect[Any], hosts: Sequence[UpHost], ask: Callable[[UpHost], Json]) -> Found:
    found: Found = {}
    for host_id, answer in ask_each(hosts, ask).items():
        if not isinstance(answer, TrimtabError):
            found[host_id] = answer
        elif not answer.retryable:
            found[host_id] = {"state": FAILED, "problem": answer.message}
        elif context.operation.attempts < PATIENCE:
            raise answer
        else:
            found[host_id] = {"state": UNKNOWN, "problem": answer.message}
    return found

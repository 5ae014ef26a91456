"""`trimtab plan`: what would be changed, in order, before anything is."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import CommandFailed, ExitCode
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import DurationType, PairType

_DEADLINE = DurationType(maximum="30d", example="2h")
_WATCH_S = 1.0


def _duration(item: Document, _now: datetime) -> str:
    return humanise.duration(float(item.get("duration_s") or 0))


def _created(item: Document, now: datetime) -> str:
    return humanise.since(item.get("created_at"), now)


def describe(item: Document) -> None:
    """Print a plan as one reviews it: what, how long, what is in the way, each step, how full the targets get."""
    moment = render.now()
    render.pairs(
        [
            ("plan", str(item.get("id", ""))),
            ("state", str(item.get("state", ""))),
            ("summary", str(item.get("summary", ""))),
            ("takes about", _duration(item, moment)),
            ("deadline", humanise.duration(item["deadline_s"]) if item.get("deadline_s") else ""),
            ("late", str(item.get("late") or "")),
            ("now", _figures(item.get("before") or {})),
            ("expected", _figures(item.get("expected") or {})),
            ("operation", str(item.get("operation") or "")),
        ]
    )
    blockers, steps, peaks = item.get("blockers") or [], item.get("steps") or [], item.get("peaks") or []
    if blockers:
        render.heading("in the way")
        for one in blockers:
            render.write_line(f"  {one.get('vm')} ({one.get('cause')}): {one.get('message')}")
            render.write_line(f"    cure: {one.get('cure')}")
    if steps:
        render.heading("steps")
        render.table(["#", "STATE", "WHAT", "VM", "FROM", "TO", "AFTER", "AT", "MESSAGE"], [_step_row(one) for one in steps])
    if peaks:
        render.heading("targets at their fullest")
        render.table(["HOST", "VCPUS", "MEMORY", "LOAD"], [_peak_row(one) for one in peaks])


def _figures(figures: Document) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in figures.items())


def _step_row(step: Document) -> list[str]:
    if step.get("volume"):
        return _volume_row(step)
    target = str(step.get("target") or "")
    shown = target if step.get("is_target_fixed") or step.get("state") == "done" or not target else f"{target}?"
    after = ",".join(str(one) for one in step.get("after") or [])
    at = humanise.duration(float(step.get("starts_s") or 0))
    return [
        str(step.get("position")), str(step.get("state")), str(step.get("kind")), str(step.get("vm") or ""),
        str(step.get("host") or ""), shown, after, f"+{at}", str(step.get("message") or ""),
    ]  # fmt: skip


def _volume_row(step: Document) -> list[str]:
    at = humanise.duration(float(step.get("starts_s") or 0))
    return [
        str(step.get("position")), str(step.get("state")), str(step.get("kind")), str(step.get("volume")),
        str(step.get("pool") or ""), str(step.get("target_pool") or ""), "", f"+{at}", str(step.get("message") or ""),
    ]  # fmt: skip


def _peak_row(peak: Document) -> list[str]:
    return [str(peak.get("host")), *(f"{float(peak.get(name) or 0):.0%}" for name in ("vcpus", "memory", "load"))]


PLAN = Resource(
    noun="plan",
    collection="plans",
    is_fleet=True,
    describe=describe,
    columns=(
        Column("id", "id"),
        Column("kind", "kind"),
        Column("state", "state"),
        Column("moves", "move_count"),
        Column("blockers", "blocker_count"),
        Column("takes", "duration_s", _duration),
        Column("created", "created_at", _created),
        Column("by", "created_by", is_wide=True),
        Column("operation", "operation", is_wide=True),
        Column("summary", "summary"),
    ),
)
_plan_id = click.argument("plan_id", metavar="PLAN")


@click.group()
def plan() -> None:
    """Changes to the fleet, reviewed before they are made."""


@plan.command("list")
@options.reads
@options.filtered
@options.limited
@click.pass_obj
def list_plans(session: Session) -> None:
    """List plans, the newest first. Filter by kind, state, created_by."""
    resources.list_all(session, PLAN)


@plan.command("get")
@_plan_id
@options.reads
@click.pass_obj
def get_plan(session: Session, plan_id: str) -> None:
    """Show a plan: its steps in order, what is in the way and the cure, how full its targets get."""
    resources.get_one(session, PLAN, plan_id)


def make(session: Session, body: Mapping[str, Any]) -> None:
    """Make a plan and show it."""
    answer = resources.change(session, "POST", PLAN.place(session), body)
    render.show_one(session, answer, PLAN.columns, describe)
    if session.is_dry_run:
        render.say("dry run: the plan was not kept")
    elif not session.is_machine_output and answer.get("steps"):
        render.say(f"apply it with `trimtab plan apply {answer['id']}`")


@plan.group("create")
def create() -> None:
    """Make a plan and keep it for review; --dry-run only shows it."""


def _of_hosts(kind: str, help_text: str) -> None:
    @create.command(kind, help=help_text)
    @click.argument("hosts", metavar="HOST...", nargs=-1, shell_complete=completion.names_of("hosts"))
    @click.option("-l", "--selector", "labels", type=PairType("rack=r2"), multiple=True, help="Hosts with this label; repeats.")
    @click.option("--deadline", type=_DEADLINE, help="Name the vm that is still in the way then.")
    @options.changes
    @click.pass_obj
    def command(session: Session, hosts: Sequence[str], labels: Sequence[tuple[str, str]], deadline: int | None) -> None:
        body: dict[str, Any] = {"kind": kind, "hosts": list(hosts), "labels": dict(labels), "deadline_s": deadline}
        make(session, {key: value for key, value in body.items() if value})


_of_hosts("drain", "Move everything off these hosts.")
_of_hosts("evacuate", "Show where the vms of lost hosts would start again.")
_of_hosts("upgrade", "Drain these hosts (all of them, if none is named) one after the other, holding each for its upgrade.")


def _of_fleet(kind: str, help_text: str) -> None:
    @create.command(kind, help=help_text)
    @click.option("--max-moves", type=click.IntRange(1, 100_000), help="So many moves at most.")
    @options.changes
    @click.pass_obj
    def command(session: Session, max_moves: int | None) -> None:
        make(session, {"kind": kind} | ({"max_moves": max_moves} if max_moves else {}))


_of_fleet("rebalance", "Even out predicted load with as few moves as pay for themselves.")
_of_fleet("consolidate", "Empty as many hosts as the others can take over.")


@create.command("undo")
@_plan_id
@options.changes
@click.pass_obj
def create_undo(session: Session, plan_id: str) -> None:
    """Take an applied plan back: what it moved returns, what it shut is opened."""
    make(session, {"kind": "undo", "plan": plan_id})


@plan.command("apply")
@_plan_id
@click.option("--watch", "-w", "is_watched", is_flag=True, help="Show each step as it changes.")
@options.runs
@click.pass_obj
def apply_plan(session: Session, plan_id: str, is_watched: bool) -> None:
    """Carry a plan out. Refused (exit code 5) where the fleet changed in a way that matters; exit code 3 where steps failed."""
    answer = resources.change(session, "POST", PLAN.place(session, plan_id, verb="apply"))
    follow(session, plan_id, answer, is_watched=is_watched)


def follow(session: Session, plan_id: str, answer: Any, *, is_watched: bool = False) -> None:
    """Carry an accepted plan to its end; CommandFailed (exit code 3) names the steps that failed."""
    if is_watched and not session.is_dry_run:
        _watch(session, plan_id)
    resources.follow(
        session,
        answer,
        sentence=lambda found: str(found.get("summary") or f"{plan_id} is applied"),
        reread=lambda: resources.read(session, PLAN, plan_id),
        resource=PLAN,
    )
    if session.is_dry_run or not session.is_waiting:
        return
    failed = [one for one in resources.read(session, PLAN, plan_id).get("steps") or [] if one.get("state") == "failed"]
    if failed:
        told = "; ".join(f"{one.get('vm') or one.get('kind')}: {one.get('message')}" for one in failed[:4])
        raise CommandFailed(
            f"{len(failed)} steps of {plan_id} failed: {told}",
            code="plan-incomplete",
            hint=f"trimtab plan get {plan_id}",
            exit_with=ExitCode.CHECK_FAILED,
        )


def _watch(session: Session, plan_id: str) -> None:
    """Print each step when its state changes, until the plan is not under way any more."""
    seen: dict[int, str] = {}
    while True:
        document = resources.read(session, PLAN, plan_id)
        for step in document.get("steps") or []:
            if seen.get(step["position"], "pending") != step["state"]:
                name = step.get("vm") or step.get("host")
                render.say(
                    f"{step['position']:>3}  {step['state']:<9} {step['kind']} {name} {step.get('message') or ''}".rstrip()
                )
            seen[step["position"]] = step["state"]
        if document.get("state") != "applying" and seen:
            return
        if not document.get("steps"):
            return
        time.sleep(_WATCH_S)


@plan.command("cancel")
@_plan_id
@options.runs
@click.pass_obj
def cancel_plan(session: Session, plan_id: str) -> None:
    """Call off what is under way; what has moved stays, and `plan create undo` takes it back."""
    answer = resources.change(session, "POST", PLAN.place(session, plan_id, verb="cancel"))
    operation = (answer or {}).get("operation") or {}
    resources.show_changed(session, PLAN, None, f"{plan_id} is being called off: `trimtab op wait {operation.get('id', '')}`")


@plan.command("delete")
@_plan_id
@options.destroys
@options.changes
@click.pass_obj
def delete_plan(session: Session, plan_id: str) -> None:
    """Forget a plan that is not under way."""
    session.confirm(f"Delete plan {plan_id}?")
    answer = resources.change(session, "DELETE", PLAN.place(session, plan_id))
    resources.show_changed(session, PLAN, answer, f"plan {plan_id} deleted")


# --- what hosts add: `host drain`, `host maintenance` -------------------------------------------------------------------------


def empty(session: Session, body: Mapping[str, Any], *, what: str, stays: str, is_plan_only: bool) -> None:
    """Make the plan of `body` and apply it, unless it is wanted for review alone. Exit code 3 where something stays."""
    if is_plan_only or session.is_dry_run:
        make(session, body)
        return
    made = resources.change(session, "POST", PLAN.place(session), body)
    for one in made.get("blockers") or []:
        render.say(f"{one['vm']} stays: {one['message']}; {one['cure']}")
    answer = session.client.send("POST", PLAN.place(session, made["id"], verb="apply"))
    follow(session, str(made["id"]), answer)
    if made.get("blockers") and session.is_waiting:
        raise CommandFailed(
            f"{what} is not empty: {made['blocker_count']} {stays}",
            code="drain-blocked",
            hint=f"trimtab plan get {made['id']}",
            exit_with=ExitCode.CHECK_FAILED,
        )


def add_to(host: click.Group, name_argument: Callable[[Any], Any]) -> None:
    """Put drain and maintenance under `trimtab host`."""

    @host.command("drain")
    @name_argument
    @click.option("--plan", "is_plan_only", is_flag=True, help="Keep the plan for review, and move nothing.")
    @click.option("--deadline", type=_DEADLINE, help="Give up on what has not moved then, and name it.")
    @options.runs
    @click.pass_obj
    def drain(session: Session, name: str, is_plan_only: bool, deadline: int | None) -> None:
        """Move everything off a healthy host, which stays cordoned. Exit code 3 where something stays."""
        body: dict[str, Any] = {"kind": "drain", "hosts": [name]} | ({"deadline_s": deadline} if deadline else {})
        empty(session, body, what=f"host {name}", stays="vms stay", is_plan_only=is_plan_only)

    @host.group("maintenance")
    def maintenance() -> None:
        """Cordon, drain and hold a host out of service."""

    @maintenance.command("start")
    @name_argument
    @options.runs
    @click.pass_obj
    def start(session: Session, name: str) -> None:
        """Cordon and drain a host, and hold it so until `host maintenance end`."""
        answer = resources.change(session, "POST", join("hosts", name) + ":start-maintenance")
        made = answer.get("plan") or {}
        for one in made.get("blockers") or []:
            render.say(f"{one['vm']} stays: {one['message']}; {one['cure']}")
        follow(session, str(made.get("id", "")), answer)

    @maintenance.command("end")
    @name_argument
    @options.changes
    @click.pass_obj
    def end(session: Session, name: str) -> None:
        """Let a host take vms again."""
        answer = resources.change(session, "POST", join("hosts", name) + ":end-maintenance")
        resources.show_changed(session, PLAN, answer, f"host {name} is out of maintenance")

"""What plans add to `trimtab pool`: `pool drain`."""

from collections.abc import Callable
from typing import Any

import click

from trimtab_controller.cli import options, render, resources
from trimtab_controller.cli.errors import CommandFailed, ExitCode
from trimtab_controller.cli.nouns.plans import PLAN, follow, make
from trimtab_controller.cli.session import Session


def add_to(pool: click.Group, name_argument: Callable[[Any], Any]) -> None:
    """Put drain under `trimtab pool`."""

    @pool.command("drain")
    @name_argument
    @click.option("--plan", "is_plan_only", is_flag=True, help="Keep the plan for review, and move nothing.")
    @options.runs
    @click.pass_obj
    def drain(session: Session, name: str, is_plan_only: bool) -> None:
        """Move every volume to other pools while its vm runs on. Exit code 3 where something stays.

        trimtab pool drain old --plan
        """
        body: dict[str, Any] = {"kind": "drain-pool", "pool": name}
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
                f"pool {name} is not empty: {made['blocker_count']} stay",
                code="drain-blocked",
                hint=f"trimtab plan get {made['id']}",
                exit_with=ExitCode.CHECK_FAILED,
            )

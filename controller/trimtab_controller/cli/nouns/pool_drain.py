"""What plans add to `trimtab pool`: `pool drain`."""

from collections.abc import Callable
from typing import Any

import click

from trimtab_controller.cli import options
from trimtab_controller.cli.nouns.plans import empty
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
        body = {"kind": "drain-pool", "pool": name}
        empty(session, body, what=f"pool {name}", stays="stay", is_plan_only=is_plan_only)

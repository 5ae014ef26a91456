"""Options that commands share, and nothing else: what they say goes into the `Session`, so that a command's signature is its own.

`reads` for get, `lists` for list, `changes` for what mutates, `runs` for what starts an operation, `destroys` for what cannot be
taken back easily.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from trimtab_controller.cli import completion
from trimtab_controller.cli.render import OUTPUTS
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import ColumnsType, DurationType, PairsType

F = TypeVar("F", bound=Callable[..., Any])


def _keep(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """Return a callback that writes a given option to the session; one not given leaves what an outer group said."""

    def keep(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        if value is None or value == ():
            return
        session = ctx.ensure_object(Session)
        # An option that repeats adds up; each of its values may be several.
        setattr(session, field, tuple(pair for group in value for pair in group) if field in {"selector", "filters"} else value)

    return keep


def _stacked(function: F, *decorators: Callable[[F], F]) -> F:
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def where(function: F) -> F:
    """Add `--project` and `--context`."""
    return _stacked(
        function,
        click.option(
            "--project", "-p", metavar="NAME", expose_value=False, callback=_keep("project_name"),
            shell_complete=completion.names_of("projects"), help="The project; TRIMTAB_PROJECT or the context's, else `default`.",
        ),
        click.option(
            "--context", metavar="NAME", expose_value=False, callback=_keep("context_name"),
            shell_complete=completion.context_names, help="A context of the contexts file, taken instead of the environment.",
        ),
    )  # fmt: skip


def shown(function: F) -> F:
    """Add `-o` and `-c`."""
    return _stacked(
        function,
        click.option(
            "--output", "-o", type=click.Choice(OUTPUTS), expose_value=False, callback=_keep("output"),
            help="How to print; machine output (json, yaml) is the API's own document.",
        ),
        click.option(
            "--columns", "-c", type=ColumnsType(), expose_value=False, callback=_keep("columns"),
            help="Columns, or paths such as labels.rack.",
        ),
    )  # fmt: skip


def reads(function: F) -> F:
    return _stacked(function, where, shown)


def selected(function: F) -> F:
    """Add `-l`, for what has labels."""
    return click.option(
        "--selector", "-l", type=PairsType("tier=web"), multiple=True, expose_value=False, callback=_keep("selector"),
        help="Only what has these labels.",
    )(function)  # fmt: skip


def filtered(function: F) -> F:
    return click.option(
        "--filter", type=PairsType("state=running", is_label=False), multiple=True, expose_value=False,
        callback=_keep("filters"), help="Only what has these values in the API's documented fields.",
    )(function)  # fmt: skip


def ordered(function: F) -> F:
    return click.option(
        "--sort-by", metavar="FIELD", expose_value=False, callback=_keep("order_by"),
        help="Order by name or created_at; `-created_at` turns it round.",
    )(function)  # fmt: skip


def limited(function: F) -> F:
    return click.option(
        "--limit", type=click.IntRange(min=1), expose_value=False, callback=_keep("limit"), help="So many at most."
    )(function)  # fmt: skip


def watched(function: F) -> F:
    return click.option(
        "--watch", "-w", is_flag=True, default=None, expose_value=False, callback=_keep("is_watching"),
        help="Go on and print each change.",
    )(function)  # fmt: skip


def lists(function: F) -> F:
    return _stacked(function, reads, selected, filtered, ordered, limited, watched)


def changes(function: F) -> F:
    return _stacked(
        function,
        reads,
        click.option(
            "--dry-run", is_flag=True, default=None, expose_value=False, callback=_keep("is_dry_run"),
            help="Check permission, input and (for a vm) placement; change nothing.",
        ),
        click.option(
            "--request-id", type=click.UUID, expose_value=False, callback=_keep_text("request_id"),
            help="A UUID; the same one again is answered as the first time and done once.",
        ),
        click.option(
            "--if-match", metavar="ETAG", expose_value=False, callback=_keep("if_match"),
            help="Refuse (exit code 5) where the etag is no longer this.",
        ),
    )  # fmt: skip


def runs(function: F) -> F:
    return _stacked(
        function,
        changes,
        click.option(
            "--wait/--no-wait", default=None, expose_value=False, callback=_keep("is_waiting"),
            help="Wait for the end (default), or print the operation's id at once.",
        ),
        waits,
    )  # fmt: skip


def waits(function: F) -> F:
    return click.option(
        "--timeout", type=DurationType(maximum="7d", example="10m"), expose_value=False, callback=_keep("wait_timeout_s"),
        help="Stop waiting then (exit code 6; default 1h); the operation goes on.",
    )(function)  # fmt: skip


def destroys(function: F) -> F:
    return click.option(
        "--yes", "-y", is_flag=True, default=None, expose_value=False, callback=_keep("is_confirmed"),
        help="Do not ask; needed where nobody can be asked.",
    )(function)  # fmt: skip


def _keep_text(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    keep = _keep(field)
    return lambda ctx, param, value: keep(ctx, param, None if value is None else str(value))

"""Completion from live names. It is asked at a keystroke: one second at most, and silent where anything fails."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_TIMEOUT_S = 1.0
_MOST_NAMES = 200

Completer = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]
_FLEET = frozenset({"projects", "users", "hosts", "host-classes", "pools", "operations", "backup-repos"})


def names_of(collection: str) -> Completer:
    """Return a completer for names of a collection such as `vms`; ids where the resources have no names."""

    def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        from trimtab_controller.cli.errors import CommandFailed
        from trimtab_controller.cli.session import Session

        session = ctx.ensure_object(Session)
        try:
            from trimtab_controller.cli.paths import join

            place = join(collection) if collection in _FLEET else join("projects", session.project, collection)
            client = session.connect(timeout_s=_TIMEOUT_S)
            try:
                answer = client.get(place, {"page_size": 1000})
            finally:
                client.close()
            names = [str(item.get("name") or item["id"]) for item in answer["items"]]
        except (CommandFailed, OSError, LookupError, TypeError, AttributeError):
            return []  # a message here would be typed into the user's command line
        return [CompletionItem(name) for name in names if name.startswith(incomplete)][:_MOST_NAMES]

    return complete


def context_names(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    from click.shell_completion import CompletionItem

    from trimtab_controller.cli import settings
    from trimtab_controller.cli.errors import CommandFailed

    try:
        names = sorted(settings.read().contexts)
    except CommandFailed:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]

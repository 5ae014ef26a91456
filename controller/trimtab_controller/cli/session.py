"""What one run of the command knows: the options given, and the client that follows from them."""

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trimtab_controller.cli import settings
from trimtab_controller.cli.errors import usage

if TYPE_CHECKING:
    from trimtab_controller.cli.client import Client

MACHINE_OUTPUTS = ("json", "yaml")


@dataclass(slots=True)
class Session:
    """Filled by the callbacks of `options`; commands read it."""

    context_name: str = ""
    project_name: str = ""
    output: str = "table"
    columns: tuple[str, ...] = ()
    selector: tuple[tuple[str, str], ...] = ()
    filters: tuple[tuple[str, str], ...] = ()
    order_by: str = ""
    limit: int | None = None
    is_watching: bool = False
    is_waiting: bool = True
    wait_timeout_s: float = 3600.0
    is_dry_run: bool = False
    is_confirmed: bool = False
    request_id: str = ""
    if_match: str = ""
    _context: settings.Context | None = field(default=None, repr=False)
    _client: "Client | None" = field(default=None, repr=False)

    @property
    def context(self) -> settings.Context:
        if self._context is None:
            self._context = settings.resolve(self.context_name)
        return self._context

    @property
    def client(self) -> "Client":
        if self._client is None:
            self._client = self.connect()
        return self._client

    def connect(self, *, timeout_s: float | None = None) -> "Client":
        """Return a client of its own, which the caller closes."""
        from trimtab_controller.cli.client import READ_TIMEOUT_S, Client

        context = self.context
        token = context.read_token()
        return Client(context.url, token=token, ca_path=context.ca, timeout_s=timeout_s or READ_TIMEOUT_S)

    @property
    def project(self) -> str:
        return self.project_name or self.context.project or "default"

    @property
    def is_machine_output(self) -> bool:
        return self.output in MACHINE_OUTPUTS

    @property
    def has_progress(self) -> bool:
        """Tell whether a line may be drawn over and over: stderr is a terminal that can."""
        return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"

    def confirm(self, question: str) -> None:
        """Return where the user agrees; refuse where nobody can be asked."""
        if self.is_confirmed or self.is_dry_run:
            return
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise usage(f"{question} Nobody can be asked here: add --yes", code="confirmation-missing")
        import click

        click.confirm(question, abort=True, err=True)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

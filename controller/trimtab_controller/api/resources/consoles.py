"""A session at a console as the API shows it."""

from dataclasses import dataclass
from datetime import datetime

from trimtab_protos.console_messages import ConsoleKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleTicket:
    """What opens one session: a websocket at `path`, with `subprotocol` and then `token` as its subprotocols."""

    id: str
    vm: str
    kind: ConsoleKind
    path: str
    subprotocol: str
    # '' in the answer to a repeat: it is shown once.
    token: str
    expires_at: datetime

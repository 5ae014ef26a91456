"""What the guest of a boot test may be asked to show, and what cannot be."""

import re
from collections.abc import Mapping
from typing import Any

from trimtab_controller.core.model import Backup
from trimtab_protos.errors import Conflict, InvalidRequest


def check_pattern(pattern: str, *, field: str) -> None:
    """InvalidRequest where the pattern is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise InvalidRequest(
            "pattern-malformed", f"{field}: no regular expression: {error}; for example `login:`", field=field
        ) from error


def require_cards(settings: Mapping[str, Any], backup: Backup, *, field: str) -> None:
    """Conflict where a guest without a network card is to answer at a port."""
    if not settings["nics"]:
        raise Conflict(
            "no-card-to-answer",
            f"{field}: vm {backup.vm_name} had no network card when backup {backup.id} was made; wait for its guest agent, or for a "
            f"pattern: `trimtab backup verify {backup.id} --boot --boot-pattern REGEX`",
            field=field,
        )

"""How a command fails: what is told, and with which exit code. Scripts rely on the codes; they never change meaning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    OK = 0
    ERROR = 1
    USAGE = 2
    CHECK_FAILED = 3
    NOT_FOUND = 4
    CONFLICT = 5
    TIMEOUT = 6
    NO_CAPACITY = 7
    QUOTA = 8
    PERMISSION = 9
    UNAVAILABLE = 10


_BY_KIND: Mapping[str, ExitCode] = {
    "invalid_request": ExitCode.USAGE,
    "not_found": ExitCode.NOT_FOUND,
    "already_exists": ExitCode.CONFLICT,
    "conflict": ExitCode.CONFLICT,
    "no_capacity": ExitCode.NO_CAPACITY,
    "quota_exceeded": ExitCode.QUOTA,
    "permission_denied": ExitCode.PERMISSION,
    "unauthenticated": ExitCode.PERMISSION,
    "unavailable": ExitCode.UNAVAILABLE,
    "rate_limited": ExitCode.UNAVAILABLE,
    "deadline_exceeded": ExitCode.TIMEOUT,
    "internal": ExitCode.ERROR,
}

# A host that is down is for a script something else than a fleet without room, or than a version that is old.
_BY_CODE: Mapping[str, ExitCode] = {"host-not-up": ExitCode.UNAVAILABLE}

_KIND_BY_STATUS: Mapping[int, str] = {
    400: "invalid_request",
    401: "unauthenticated",
    403: "permission_denied",
    404: "not_found",
    405: "invalid_request",
    409: "conflict",
    412: "conflict",
    413: "invalid_request",
    422: "invalid_request",
    429: "rate_limited",
    502: "unavailable",
    503: "unavailable",
    504: "deadline_exceeded",
    507: "unavailable",
}


@dataclass(eq=False)
class CommandFailed(Exception):
    """Ends a command. `hint` is the next command to run, without a prompt; `operation_id` names the work it is about."""

    message: str
    code: str = "error"
    kind: str = "internal"
    request_id: str = ""
    operation_id: str = ""
    hint: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)
    # Of a refused request: {field, message, example?} each.
    fields: Sequence[Mapping[str, Any]] = ()
    # Given where the kind alone does not say it, as for a failed check.
    exit_with: ExitCode | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def exit_code(self) -> ExitCode:
        if self.exit_with is not None:
            return self.exit_with
        return _BY_CODE.get(self.code) or _BY_KIND.get(self.kind, ExitCode.ERROR)

    def as_json(self) -> dict[str, Any]:
        """Return the error as `-o json` prints it on stderr: every key always there."""
        return {
            "error": self.message,
            "code": self.code,
            "kind": self.kind,
            "request_id": self.request_id,
            "operation_id": self.operation_id,
            "next": self.hint,
            "context": dict(self.context),
            "errors": [dict(one) for one in self.fields],
            "exit_code": int(self.exit_code),
        }

    def as_text(self) -> str:
        lines = [f"error: {self.message}"]
        for one in self.fields:
            example = one.get("example")
            tail = f" (for example {example})" if example not in {None, ""} else ""
            said = str(one.get("message", ""))
            if not tail and said and said in self.message:
                continue
            lines.append(f"  {one.get('field', '?')}: {said}{tail}")
        # One a line: what each host lacks.
        lines += [f"  {reason}" for reason in str(self.context.get("reasons", "")).splitlines() if reason not in self.message]
        trace = [f"code: {self.code}"]
        if self.operation_id:
            trace.append(f"operation: {self.operation_id}")
        if self.request_id:
            trace.append(f"request: {self.request_id}")
        lines.append("  ".join(trace))
        if self.hint:
            lines.append(f"next: {self.hint}")
        return "\n".join(lines)


def usage(message: str, *, code: str = "usage", hint: str = "") -> CommandFailed:
    """Return the failure of a command line that can never succeed as it is."""
    return CommandFailed(message, code=code, kind="invalid_request", hint=hint)


def from_problem(status: int, document: object, *, request_id: str) -> CommandFailed:
    """Return the failure that an answer of the API describes; anything that is no problem document (a proxy's page) is named
    by its status.
    """
    problem: Mapping[str, Any] = document if isinstance(document, Mapping) else {}
    kind = str(problem.get("kind") or _KIND_BY_STATUS.get(status, "internal"))
    context = problem.get("context")
    fields = problem.get("errors")
    facts: Mapping[str, Any] = context if isinstance(context, Mapping) else {}
    return CommandFailed(
        str(problem.get("detail") or problem.get("title") or f"the controller answered with status {status}"),
        code=str(problem.get("code") or f"http-{status}"),
        kind="unauthenticated" if status == 401 else kind,
        request_id=str(problem.get("request_id") or request_id),
        operation_id=str(facts.get("operation_id", "")),
        hint=str(facts.get("next", "")) or ("trimtab login --url URL --ca FILE --token-stdin" if status == 401 else ""),
        context=facts,
        fields=[one for one in fields if isinstance(one, Mapping)] if isinstance(fields, list) else (),
    )


def from_operation(operation: Mapping[str, Any]) -> CommandFailed:
    """Return the failure of an operation that ended other than `done`."""
    state = str(operation.get("state", "unknown"))
    identifier = str(operation.get("id", ""))
    error: Mapping[str, Any] = operation.get("error") or {}
    context: Mapping[str, Any] = error.get("context") or {}
    subject = (operation.get("subject") or {}).get("name", "")
    title = f"{operation.get('kind', 'operation')} {subject}".strip()
    if state == "cancelled":
        return CommandFailed(
            f"{title} was cancelled and undone",
            code="operation-cancelled",
            kind="conflict",
            operation_id=identifier,
            hint=f"trimtab op get {identifier}",
            exit_with=ExitCode.ERROR,
        )
    message = str(error.get("message") or f"it ended as {state}")
    parked = state == "needs_attention"
    next_command = f"trimtab op retry {identifier}" if parked else f"trimtab op get {identifier}"
    return CommandFailed(
        f"{title}: {message}" + (" (not undone: an operator must decide)" if parked else ""),
        code=str(error.get("code") or f"operation-{state.replace('_', '-')}"),
        kind=str(error.get("kind") or "internal"),
        request_id=str(operation.get("request_id") or ""),
        operation_id=identifier,
        hint=str(context.get("next") or next_command),
        context=context,
    )

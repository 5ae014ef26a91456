"""Turns every refusal into RFC 9457 problem details: the only place that knows HTTP statuses of errors."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from trimtab_controller.api.examples import example_at
from trimtab_controller.services.authorise import Unauthenticated
from trimtab_protos.errors import ErrorKind, TrimtabError, Unavailable

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"

STATUS_BY_KIND: Mapping[ErrorKind, int] = {
    ErrorKind.INVALID_REQUEST: 400,
    ErrorKind.NOT_FOUND: 404,
    ErrorKind.ALREADY_EXISTS: 409,
    ErrorKind.CONFLICT: 409,
    ErrorKind.NO_CAPACITY: 409,
    ErrorKind.QUOTA_EXCEEDED: 409,
    ErrorKind.PERMISSION_DENIED: 403,
    ErrorKind.UNAVAILABLE: 503,
    ErrorKind.DEADLINE_EXCEEDED: 504,
    ErrorKind.INTERNAL: 500,
}
# Where HTTP has a sharper word than the kind.
STATUS_BY_CODE: Mapping[str, int] = {
    "stale-etag": 412,
    "events-expired": 410,
    "body-too-large": 413,
    "length-required": 411,
    "database-full": 507,
}
RETRY_AFTER_S = 2

SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "description": "RFC 9457 problem details.",
    "required": ["type", "title", "status", "detail", "code", "kind", "context", "request_id", "errors"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:trimtab:error:vm-not-found"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "kind": {"type": "string"},
        "context": {"type": "object", "additionalProperties": {"type": "string"}},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}, "example": {}},
            },
        },
    },
}


class RateLimited(Unavailable):
    """Too many requests of one caller."""

    def __init__(self, code: str, message: str, *, retry_after_s: int) -> None:
        super().__init__(code, message, retry_after_s=retry_after_s)
        self.retry_after_s = retry_after_s


def of_error(error: TrimtabError, *, request_id: str) -> Response:
    """Return the response of a typed error."""
    kind, headers = error.kind.value, {}
    status = STATUS_BY_CODE.get(error.code, STATUS_BY_KIND[error.kind])
    if isinstance(error, Unauthenticated):
        status, kind, headers = 401, "unauthenticated", {"WWW-Authenticate": 'Bearer realm="trimtab"'}
    elif isinstance(error, RateLimited):
        status, kind, headers = 429, "rate_limited", {"Retry-After": str(error.retry_after_s)}
    elif status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers = {"Retry-After": str(RETRY_AFTER_S)}
    errors = []
    if error.kind is ErrorKind.INVALID_REQUEST and "field" in error.context:
        errors = [{"field": error.context["field"], "message": error.message}]
    return _response(
        status=status,
        code=error.code,
        kind=kind,
        detail=error.message,
        context=error.context,
        errors=errors,
        request_id=request_id,
        headers=headers,
    )


def of_validation(error: RequestValidationError, request: Request, *, request_id: str) -> Response:
    """Return the response of a request that does not have the documented shape: one entry per field, with an example."""
    errors = []
    for one in error.errors()[:50]:
        # The first part says where: body, query, path or header.
        location = one["loc"][1:] if one["type"] != "json_invalid" else ()
        entry: dict[str, Any] = {"field": field_path(location) or str(one["loc"][0]), "message": _message(one)}
        example = example_at(request, one["loc"])
        if example is not None:
            entry["example"] = example
        errors.append(entry)
    detail = "; ".join(f"{entry['field']}: {entry['message']}" for entry in errors[:5])
    return _response(
        status=400,
        code="request-invalid",
        kind=ErrorKind.INVALID_REQUEST.value,
        detail=detail,
        context={},
        errors=errors,
        request_id=request_id,
        headers={},
    )


def of_http(error: HTTPException, *, request_id: str) -> Response:
    """Return the response of what the framework refuses: no such route, method, or a body beyond its bound."""
    kinds = {
        401: "unauthenticated",
        403: "permission_denied",
        404: "not_found",
        413: "invalid_request",
        429: "rate_limited",
        503: "unavailable",
    }
    codes = {
        404: "route-not-found",
        408: "body-stalled",
        405: "method-not-allowed",
        413: "body-too-large",
        415: "media-type-unsupported",
    }
    status = error.status_code
    return _response(
        status=status,
        code=codes.get(status, "request-refused"),
        kind=kinds.get(status, "invalid_request"),
        detail=str(error.detail)[:500],
        context={},
        errors=[],
        request_id=request_id,
        headers=dict(error.headers or {}),
    )


def of_defect(*, request_id: str) -> Response:
    """Return the response of a defect of ours; the log has the rest, under the request's id."""
    return _response(
        status=500,
        code="internal",
        kind=ErrorKind.INTERNAL.value,
        detail=f"a defect of the controller; its log tells more under request id {request_id}",
        context={},
        errors=[],
        request_id=request_id,
        headers={},
    )


def field_path(location: Sequence[Any]) -> str:
    """Return `networks[0].mac` for ("networks", 0, "mac")."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else str(part))
    return path


def _message(error: Mapping[str, Any]) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "there is no such field"
        case "missing":
            return "this field is required"
        case "json_invalid":
            return f"the body is no JSON: {error.get('ctx', {}).get('error', '')}"
        # pydantic names Python's types, which are nothing to whoever writes JSON.
        case "tuple_type" | "list_type":
            return "Input should be a list"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "Input should be an object"
        case "too_long" | "too_short":
            return str(error["msg"]).replace("Tuple", "List").replace("Dictionary", "Object").replace(" after validation", "")
    return str(error["msg"]).removeprefix("Value error, ")[:300]


def _response(
    *,
    status: int,
    code: str,
    kind: str,
    detail: str,
    context: Mapping[str, str],
    errors: Sequence[Mapping[str, Any]],
    request_id: str,
    headers: Mapping[str, str],
) -> Response:
    document = {
        "type": f"urn:trimtab:error:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
        "kind": kind,
        "context": dict(context),
        "request_id": request_id,
        "errors": list(errors),
    }
    return Response(json.dumps(document), status_code=status, media_type=MEDIA_TYPE, headers=dict(headers))

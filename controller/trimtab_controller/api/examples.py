"""Finds the documented example of the field that a validation error names."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

KEY = "[key]"
"""What pydantic's `loc` ends with, after the key itself, where it means the key and not its value."""


def example_at(request: Request, location: Sequence[Any]) -> Any:
    """Return the first example of the field at pydantic's `loc`, from the OpenAPI document; None where it has none."""
    path = str(getattr(request.scope.get("route"), "path_format", ""))
    return documented_example(request.app.openapi(), path, request.method, location)


def documented_example(document: Mapping[str, Any], path: str, method: str, location: Sequence[Any]) -> Any:
    """Return what `document` shows for a field of the route at `path`; None where it shows nothing."""
    operation: Mapping[str, Any] | None = document["paths"].get(path, {}).get(method.lower())
    if operation is None or not location:
        return None
    if location[0] == "body":
        content: Mapping[str, Any] = operation.get("requestBody", {}).get("content", {})
        documented = [one["schema"] for one in content.values() if "schema" in one]
        return _walk(document, documented[0], location[1:]) if documented else None
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == location[0] and parameter["name"] == location[-1]:
            return _first_example(document, parameter.get("schema", {}))
    return None


def _walk(document: Mapping[str, Any], schema: Any, location: Sequence[Any]) -> Any:
    if location and location[-1] == KEY:
        location = (*location[:-2], KEY)
    for part in location:
        schema = _below(_resolve(document, schema), part)
        if not isinstance(schema, Mapping):
            return None
    return _first_example(document, schema)


def _below(schema: Mapping[str, Any], part: Any) -> Any:
    if isinstance(part, int):
        return schema.get("items")
    properties = schema.get("properties", {})
    if part in properties:
        return properties[part]
    if part == KEY:
        return schema.get("propertyNames")
    # Values of a mapping: its keys have one pattern, or none.
    return next(iter(schema.get("patternProperties", {}).values()), schema.get("additionalProperties"))


def _resolve(document: Mapping[str, Any], schema: Any) -> Mapping[str, Any]:
    """Follow references and take the first alternative that is not null."""
    for _ in range(8):  # references of ours are never deeper
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
        elif "anyOf" in schema:
            schema = next((one for one in schema["anyOf"] if one.get("type") != "null"), {})
        else:
            break
    return schema if isinstance(schema, Mapping) else {}


def _first_example(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Any:
    resolved = _resolve(document, schema)
    # An alternative of `anyOf` may have an example beside its reference.
    for candidate in (schema, *schema.get("anyOf", ()), resolved):
        examples = candidate.get("examples")
        if examples:
            return examples[0]
        if candidate.get("enum"):
            return candidate["enum"][0]
        if "const" in candidate:
            return candidate["const"]
    if resolved.get("type") == "boolean":
        return True
    # A part of a body that shows nothing itself: what it has to have, each with its own example.
    needed = {name: _first_example(document, resolved["properties"][name]) for name in resolved.get("required", ())}
    return needed or None

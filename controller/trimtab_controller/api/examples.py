"""Finds the documented example of the field that a validation error names."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request


def example_at(request: Request, location: Sequence[Any]) -> Any:
    """Return the first example of the field at pydantic's `loc`, from the OpenAPI document; None where it has none."""
    document: Mapping[str, Any] = request.app.openapi()
    path = str(getattr(request.scope.get("route"), "path_format", ""))
    operation: Mapping[str, Any] | None = document["paths"].get(path, {}).get(request.method.lower())
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
    for part in location:
        schema = _resolve(document, schema)
        if isinstance(part, int):
            schema = schema.get("items")
        else:
            properties = schema.get("properties", {})
            schema = properties.get(part, schema.get("additionalProperties") if part not in properties else None)
        if not isinstance(schema, Mapping):
            return None
    return _first_example(document, schema)


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
    for candidate in (schema, _resolve(document, schema)):
        examples = candidate.get("examples")
        if examples:
            return examples[0]
        if candidate.get("enum"):
            return candidate["enum"][0]
    return None

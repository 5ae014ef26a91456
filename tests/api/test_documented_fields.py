"""Every field that any route takes, generated from the OpenAPI document: each has a bound, and an example that a refusal shows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from tests.api.kit import build_app
from trimtab_controller.api.examples import KEY, documented_example

BOUNDS = {"enum", "const", "pattern", "format", "maxLength", "maximum", "maxItems", "maxProperties"}


@dataclass(frozen=True)
class Field:
    method: str
    path: str
    # As pydantic says where it is: what a refusal looks the example up by.
    location: tuple[Any, ...]
    schema: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path} {'.'.join(map(str, self.location))}"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The OpenAPI document of an application that nobody starts."""
    found: dict[str, Any] = build_app("sqlite:///unused.db", Path("unused")).app.openapi()
    return found


@pytest.fixture(scope="module")
def fields(document: dict[str, Any]) -> list[Field]:
    found = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parameters = operation.get("parameters", ())
            found += [Field(method, path, (one["in"], one["name"]), schema_of(document, one["schema"])) for one in parameters]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is not None:
                found += [Field(method, path, *one) for one in below(document, ("body",), schema_of(document, body["schema"]))]
    return found


def schema_of(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a schema refers to; of `anyOf` what is not null, which has to be one: of a union nobody could show one example."""
    while "$ref" in schema or "anyOf" in schema:
        if "anyOf" in schema:
            (schema,) = [one for one in schema["anyOf"] if one.get("type") != "null"]
        else:
            schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    return schema


def below(
    document: Mapping[str, Any], location: tuple[Any, ...], schema: Mapping[str, Any]
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Yield everything in a value of this schema: properties, items, keys and values, and what is in those."""
    inside = list(schema.get("properties", {}).items())
    if "items" in schema:
        inside.append((0, schema["items"]))
    for pattern, value in schema.get("patternProperties", {}).items():
        yield (*location, "key", KEY), {**schema["propertyNames"], "pattern": pattern}
        inside.append(("key", value))
    if isinstance(schema.get("additionalProperties"), Mapping):
        yield (*location, "key", KEY), schema["propertyNames"]
        inside.append(("key", schema["additionalProperties"]))
    for part, one in inside:
        resolved = schema_of(document, one)
        yield (*location, part), resolved
        yield from below(document, (*location, part), resolved)


def is_bounded(schema: Mapping[str, Any]) -> bool:
    is_part = "properties" in schema and schema.get("additionalProperties") is False
    return schema.get("type") == "boolean" or is_part or bool(BOUNDS & schema.keys())


def test_every_field_is_bounded(fields: list[Field]) -> None:
    assert len(fields) > 1000
    assert [str(field) for field in fields if not is_bounded(field.schema)] == []


def test_every_field_has_an_example_and_each_is_within_its_bound(document: dict[str, Any], fields: list[Field]) -> None:
    missing, wrong = [], []
    for field in fields:
        example = documented_example(document, field.path, field.method, field.location)
        if example is None:
            missing.append(str(field))
        elif not jsonschema_rs.is_valid({**field.schema, "components": document["components"]}, example):
            wrong.append((str(field), example))
    assert missing == []
    assert wrong == []

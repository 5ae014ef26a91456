"""The OpenAPI document, and a page that lists the routes without anything from elsewhere."""

import html
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.responses import HTMLResponse, JSONResponse, Response

from trimtab_controller.api.problems import MEDIA_TYPE, SCHEMA
from trimtab_controller.api.security import declaration_of, requires
from trimtab_controller.core.model import Role
from trimtab_controller.services.authorise import Access, Scope

router = APIRouter(include_in_schema=False)
Public = Annotated[Access, requires(Role.VIEWER, Scope.PUBLIC)]
_HTTP_METHODS = ("get", "post", "put", "patch", "delete")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1c2430;background:#fff}
h1{font-size:1.5rem} h2{font-size:1.1rem;margin-top:2rem;text-transform:capitalize}
table{border-collapse:collapse;width:100%} td{padding:.3rem .6rem;border-top:1px solid #dde3ea;vertical-align:top}
td:first-child{width:4.5rem;font-weight:600} code{font:13px ui-monospace,monospace} .who{color:#5b6776;white-space:nowrap}
@media(prefers-color-scheme:dark){body{background:#12161c;color:#dbe2ea}td{border-color:#2a323c}.who{color:#8d99a8}}
"""


# By the routes that it describes; these live as long as the process.
_documents: dict[tuple[int, ...], dict[str, Any]] = {}


def document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document: FastAPI's, with our errors, our security, and who may call what.

    It takes half a second to make, and is the same for every application of the process: they share their routes.
    """
    routes = tuple(id(route) for route in app.routes)
    if app.openapi_schema is None:
        app.openapi_schema = _documents.get(routes)
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
        )
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {})["Problem"] = dict(SCHEMA)
        for unused in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(unused, None)
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "tt-..."}}
        for route in app.routes:
            if isinstance(route, APIRoute) and route.include_in_schema:
                _amend(schema["paths"][route.path_format], route)
        app.openapi_schema = _documents[routes] = schema
    return app.openapi_schema


def _amend(methods: dict[str, Any], route: APIRoute) -> None:
    declared = declaration_of(route)
    assert declared is not None
    problem = {"content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    for method in sorted(one.lower() for one in route.methods or ()):
        operation = methods[method]
        responses = operation["responses"]
        responses.pop("422", None)
        responses["4XX"] = {"description": "The request is refused.", **problem}
        responses.setdefault("503", {"description": "Not now; try again later.", **problem})
        made = responses.get("201") or responses.get("202")
        if made is not None:
            responses["200"] = {**made, "description": "With validate_only: what would be answered; nothing was changed."}
        if declared.scope is not Scope.PUBLIC:
            operation["security"] = [{"token": []}]
            operation["x-trimtab-role"] = f"{declared.role.value} on {declared.scope.value}"


@router.get("/v1/openapi.json")
async def get_openapi_document(request: Request, _access: Public) -> Response:
    return JSONResponse(request.app.openapi())


@router.get("/docs")
async def get_docs(request: Request, _access: Public) -> Response:
    """Return the list of routes; nothing on the page comes from another host."""
    schema = request.app.openapi()
    by_tag: dict[str, list[str]] = {}
    for path, methods in schema["paths"].items():
        for method in _HTTP_METHODS:
            if method in methods:
                operation = methods[method]
                by_tag.setdefault(operation.get("tags", ["other"])[0], []).append(_line(method, path, operation))
    tables = "".join(f"<h2>{html.escape(tag)}</h2><table>{''.join(lines)}</table>" for tag, lines in by_tag.items())
    title = html.escape(f"{schema['info']['title']} {schema['info']['version']}")
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f'<p>OpenAPI: <a href="/v1/openapi.json">/v1/openapi.json</a></p>{tables}</html>'
    )
    return HTMLResponse(page)


def _line(method: str, path: str, operation: dict[str, Any]) -> str:
    told = html.escape(operation.get("description") or operation.get("summary", ""))
    who = html.escape(operation.get("x-trimtab-role", "everybody"))
    return f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code><br>{told}</td><td class=who>{who}</td></tr>"

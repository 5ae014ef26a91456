"""Each route is reached by its own path: none that comes before it takes its requests, in whichever order modules are put together."""

import re

from starlette.routing import BaseRoute, Match, Route, WebSocketRoute

from trimtab_controller.api.app import ROUTERS

ROUTES = [route for router in ROUTERS for route in router.routes]


def first_for(kind: str, method: str, path: str) -> BaseRoute | None:
    scope = {"type": kind, "path": path, "method": method, "root_path": "", "path_params": {}, "headers": []}
    return next((route for route in ROUTES if route.matches(scope)[0] is Match.FULL), None)


def test_no_route_takes_the_requests_of_another() -> None:
    shadowed = []
    for route in ROUTES:
        assert isinstance(route, Route | WebSocketRoute)
        path = re.sub(r"\{[^}]+\}", "web1", route.path)
        kind, methods = ("http", route.methods or set()) if isinstance(route, Route) else ("websocket", {"GET"})
        shadowed += [f"{method} {route.path}" for method in sorted(methods) if first_for(kind, method, path) is not route]
    assert shadowed == []
    assert len(ROUTES) > 150

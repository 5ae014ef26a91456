"""What another project has is not there for a caller, by name or by id, in a path or in a body: generated from the routes.

Project p2 has one of everything, each named `theirs`, and p1 one of everything named `ours`. The administrator of p1 asks every route
for what is p2's: on no row of p2's may that show, and in no answer.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy.orm import Session

from tests.api.kit import Api, running_api
from tests.api.test_backups import ready
from tests.api.test_documented_fields import below, schema_of
from tests.api.test_mutations import BODIES
from tests.api.test_routers import LAN, lab
from trimtab_controller.api.examples import KEY
from trimtab_controller.api.fields import HOST_NAME_PATTERN
from trimtab_controller.clock import mint
from trimtab_controller.store import backup_settings, backups, images, schema

OURS, THEIRS = "ours", "theirs"
WRITTEN_BY_ASKING = {"audit", "idempotency"}
"""Tables that say what was asked for, in the caller's own words."""
REFERENCES = {HOST_NAME_PATTERN, f"({HOST_NAME_PATTERN})|^$"}
"""What a field of a body that names something has as its pattern; an upload's has one of its own."""
P = "/v1/projects/{project}"
BASES: dict[str, Any] = {
    **{path: json.loads(json.dumps(body).replace("absent", OURS)) for path, body in BODIES.items()},
    f"{P}/vms": {"name": "new", "image": "debian", "memory_mib": 512},
    f"{P}/backup-instants": {"name": "new", "vms": [OURS, f"{OURS}-2"]},
    f"{P}/recovery-plans": {"name": "new", "groups": [{"name": "data", "vms": [OURS]}]},
    f"{P}/routers": {"name": "new"},
    f"{P}/backup-instants/{{name}}:restore": {"name_pattern": "{vm}-back"},
}
"""Bodies that would be accepted but for the reference that is put into them."""
INSTEAD_OF = {"volume": "image", "iso": "image", "policy": "vms"}
"""What does not stand beside what."""
WORDS = {
    (f"{P}/vms", "seed"),
    *((f"{P}/recovery-plans{verb}", field) for verb in ("", ":import") for field in ("groups", "networks", "pools")),
}
"""What looks like a reference and is none: a guest's own name; names that a plan looks up when it runs, in its own project."""
MAPPED = {"networks": OURS, "pools": "local"}
"""What mappings are from: where what our backups hold was."""
OF_THE_FLEET = {"host", "to_host", "bridges"}
"""Fields that name hosts, which are nobody's and which a project's administrator may not choose; nor may it adopt what is on them."""
UNNAMED = {f"{P}/backups/": "backup", f"{P}/floating-addresses/": "floating"}


KINDS = {"backup", "backup_instant", "backup_policy", "console", "floating", "image", "network", "nic", "operation"}
KINDS |= {"recovery_plan", "router", "secgroup", "snapshot", "template", "upload", "vm", "vm_group", "volume"}
"""Tables of which p2 has at least one row."""


@dataclass(frozen=True)
class Known:
    """What a project has: ids by table, and every id that only it knows."""

    ids: dict[str, str]
    secrets: frozenset[str]


@dataclass(frozen=True)
class Asked:
    method: str
    route: str
    path: str
    target: str
    body: Any
    field: str = ""


async def equip_project(api: Api, project: str, name: str) -> None:
    """Give a project one of everything that a route can name, as if all of it had been made."""
    base, admin = f"/v1/projects/{project}", f"{project}-admin"
    image = {"kind": "disk", "format": "qcow2", "source_sha256": "", "labels": {}, "now": api.clock.now()}
    await api.write(lambda session: images.insert(session, image_id=mint("img"), project_id=api.ids[project], name=name, **image))
    await make(api, admin, f"{base}/uploads", content=b"x" * 512)
    for path, body in (
        ("networks", lab(name, f"10.{30 + len(name)}.0.0/24")),
        ("routers", {"name": name, "networks": [name], "outer": "lan"}),
        ("secgroups", {"name": name, "rules": []}),
        ("vm-groups", {"name": name, "rules": [{"relation": "anti-affinity"}]}),
        ("vms", {"name": f"{name}-2", "image": "debian", "memory_mib": 512}),
        ("vms", {"name": name, "image": "debian", "memory_mib": 512, "networks": [{"network": name}]}),
        ("volumes", {"name": name, "size_bytes": 1 << 30, "pool": "local"}),
        ("floating-addresses", {"network": "lan"}),
        ("backup-policies", {"name": name, "schedule": "0 2 * * *"}),
        ("recovery-plans", {"name": name, "groups": [{"name": "data", "vms": [name]}]}),
        (f"vms/{name}/snapshots", {"name": name}),
        ("templates", {"name": name, "from_vm": name}),
        ("backup-instants", {"name": name, "vms": [name, f"{name}-2"]}),
        (f"vms/{name}:console", {}),
        ("backups", {"vm": name}),
    ):
        await make(api, admin, f"{base}/{path}", json=body)


async def make(api: Api, caller: str, path: str, **options: Any) -> None:
    made = await api.call(caller, "POST", path, **options)
    assert made.status_code in {201, 202}, f"{path}: {made.text}"
    await end_all(api)


async def end_all(api: Api) -> None:
    """Say that all of it was done: guests run on node1, with their disks, and nothing is under way."""
    await api.end_operations()
    node1 = api.ids["node1"]
    for backup in await api.rows(schema.backup, state="running"):
        await api.write(lambda session, backup=backup: end_backup(session, backup))
    for table, values in (
        (schema.backup_instant, {"state": "consistent"}),
        (schema.image, {"state": "ready", "virtual_size_bytes": 1 << 30}),
        (schema.vm, {"observed_state": "running", "host_id": node1}),
        (schema.volume, {"observed_state": "present", "host_id": node1}),
        (schema.snapshot, {"state": "ready"}),
    ):
        await api.write(lambda session, table=table, values=values: session.execute(table.update().values(**values)))


def end_backup(session: Session, backup: Any) -> None:
    settings = backup_settings.read(session, backup["vm_id"], repo_id=backup["repo_id"])
    manifest = {"disks": [{"name": "vda", "size_bytes": 1 << 30}], "notes": {}, "settings": json.loads(json.dumps(settings))}
    backups.update(session, backup["id"], state="ready", manifest=manifest, taken_at=backup["created_at"])


async def known_of(api: Api, project: str) -> Known:
    ids, secrets = {}, {api.ids[project]}
    tables = [table for table in schema.metadata.sorted_tables if "id" in table.c and table.name not in WRITTEN_BY_ASKING]
    for owner, owners in (("project_id", {api.ids[project]}), ("vm_id", secrets)):
        for table in tables:
            rows = await api.rows(table) if owner in table.c else []
            for row in [one for one in rows if one[owner] in owners]:
                ids[table.name] = row["id"]
                secrets.add(row["id"])
    return Known(ids, frozenset(secrets))


async def rows_of(api: Api, theirs: Known) -> set[str]:
    """Return every row anywhere that says an id of p2's: its own, and what refers to them."""
    word = re.compile("|".join(map(re.escape, theirs.secrets)))
    found = set()
    for table in schema.metadata.sorted_tables:
        if table.name not in WRITTEN_BY_ASKING:
            found |= {text for row in await api.rows(table) if word.search(text := f"{table.name} {row}")}
    return found


def routes(api: Api) -> Iterator[tuple[str, str, list[str]]]:
    """Yield method, path and parameters of every route that names something of a project's."""
    for route in api.app.routes:
        if isinstance(route, APIRoute):
            named = re.findall(r"{(\w+)}", route.path_format)
            if ("project" in named and "user" not in named) or "operation" in named:
                for method in sorted(route.methods or ()):
                    yield method, route.path_format, [one for one in named if one != "project"]


def asked_in_paths(api: Api, targets: list[str]) -> Iterator[Asked]:
    """Yield requests whose path names `targets`: in each place by itself with ours in the others, and in all at once."""
    document = api.app.openapi()
    for method, path, named in routes(api):
        shapes = {one["name"]: one["schema"] for one in document["paths"][path][method.lower()]["parameters"]}
        for target in targets:
            if named and all(re.search(shapes[one]["pattern"], target) for one in named):
                for ours in {(), *((one,) for one in named if len(named) > 1)}:
                    filling = {**dict.fromkeys(named, target), **dict.fromkeys(ours, OURS)}
                    body = BASES.get(path, {}) if method in {"POST", "PUT", "PATCH"} else None
                    yield Asked(method, path, path.format(project="p1", **filling), target, body)


def asked_in_bodies(api: Api, ours: Known, targets: list[str]) -> Iterator[Asked]:
    """Yield requests that are about ours, with one reference in their body that is theirs."""
    document = api.app.openapi()
    for method, path, named in routes(api):
        content = document["paths"][path][method.lower()].get("requestBody", {}).get("content", {})
        if "application/json" not in content:
            continue
        for location, field in below(document, ("body",), schema_of(document, content["application/json"]["schema"])):
            is_left_out = (path, location[1]) in WORDS or OF_THE_FLEET & set(location) or path.endswith("vms:adopt")
            if is_left_out or not is_reference(field) or location[-1] == KEY:
                continue
            for target in targets:
                if re.search(field["pattern"], target):
                    base = {name: one for name, one in BASES.get(path, {}).items() if INSTEAD_OF.get(location[-1]) != name}
                    name = next((ours.ids[table] for start, table in UNNAMED.items() if path.startswith(start)), OURS)
                    filled = path.format(project="p1", **dict.fromkeys(named, name))
                    yield Asked(method, path, filled, target, put(base, location[1:], target), str(location[-1]))


def is_reference(field: Any) -> bool:
    pattern = field.get("pattern", "")
    return pattern in REFERENCES or pattern.startswith("^up-")


def put(value: Any, location: tuple[Any, ...], target: str) -> Any:
    """Return what has the target there, and around it what `value` has."""
    match location:
        case ():
            return target
        case (name, "key"):
            return {**value, name: {MAPPED[name]: target}}
        case (int(), *rest):
            first, *others = value or [None]
            return [put(first, tuple(rest), target), *others]
        case (name, *rest):
            kept: dict[str, Any] = value or {}
            return {**kept, name: put(kept.get(name), tuple(rest), target)}
    raise AssertionError(location)


@pytest.fixture
async def two(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(sqlite_url, tmp_path) as api:
        runtime = api.app.state.runtime
        runtime.context = replace(runtime.context, settings=replace(runtime.context.settings, has_overlay=True))
        await api.equip(memory_mib=1 << 20)
        await make(api, "admin", "/v1/networks", json=LAN)
        await ready(api)
        await equip_project(api, "p1", OURS)
        await equip_project(api, "p2", THEIRS)
        yield api


async def test_what_another_project_has_is_not_there_by_path(two: Api) -> None:
    theirs = await known_of(two, "p2")
    targets = [*theirs.ids.values(), THEIRS]
    await ask_and_find_nothing(two, theirs, list(asked_in_paths(two, targets)), least=1300)


async def test_what_another_project_has_is_not_there_by_reference_in_a_body(two: Api) -> None:
    ours, theirs = await known_of(two, "p1"), await known_of(two, "p2")
    targets = [*theirs.ids.values(), THEIRS]
    await ask_and_find_nothing(two, theirs, list(asked_in_bodies(two, ours, targets)), least=600)


async def test_a_recovery_plan_that_names_another_projects_vm_finds_none(two: Api) -> None:
    theirs = await known_of(two, "p2")
    before = await rows_of(two, theirs)
    body = {"name": "new", "groups": [{"name": "data", "vms": [THEIRS]}]}
    await make(two, "p1-admin", "/v1/projects/p1/recovery-plans", json=body)
    shown = await two.call("p1-admin", "GET", "/v1/projects/p1/recovery-plans/new/preview")
    assert shown.status_code == 200, shown.text
    assert not [word for word in theirs.secrets if word in shown.text]
    assert await rows_of(two, theirs) == before


async def test_no_list_shows_anything_of_another_project(two: Api) -> None:
    theirs, asked = await known_of(two, "p2"), 0
    for route in two.app.routes:
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()) and set(route.param_convertors) <= {"project"}:
            answer = await two.call("p1-admin", "GET", route.path_format.format(project="p1"))
            assert not [word for word in theirs.secrets if word in answer.text], route.path_format
            asked += answer.status_code == 200
    assert asked >= 20


async def ask_and_find_nothing(api: Api, theirs: Known, asked: list[Asked], *, least: int) -> None:
    """Each is answered that the target, by what it was called, is not there; nothing of p2's is told or changed."""
    assert set(theirs.ids) >= KINDS
    assert len(asked) >= least
    before, wrong = await rows_of(api, theirs), []
    async with api.as_("p1-admin") as client:
        for one in asked:
            answer = await client.request(one.method, one.path, **({"json": one.body} if one.body is not None else {}))
            if answer.status_code < 400:
                await end_all(api)
            if not is_refusal(one, answer) or any(word in answer.text for word in theirs.secrets - {one.target}):
                wrong.append((one, answer.status_code, answer.text[:300]))
    assert wrong == []
    assert await rows_of(api, theirs) == before


def is_refusal(asked: Asked, answer: httpx.Response) -> bool:
    """Tell whether the answer is that there is no such thing; one that names another thing never came to this one."""
    if answer.status_code not in {400, 404}:
        return False
    problem = answer.json()
    is_absent = answer.status_code == 404 or problem["code"] in {"network-not-mapped", "pool-not-mapped"}
    return is_absent and asked.target in problem["detail"]

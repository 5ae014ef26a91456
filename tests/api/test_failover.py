"""Failover and fencing over REST: what is shown, who may say what, and that secrets go in and never come out."""

from datetime import timedelta
from typing import Any

from tests.api.kit import Api
from tests.api.test_plans import place
from trimtab_controller.clock import mint
from trimtab_controller.secret_box import SecretBox
from trimtab_controller.services.fencing import place_of
from trimtab_controller.store import failover, schema

SECRET = "correct horse battery staple"
DEVICE: dict[str, Any] = {"name": "bmc", "agent": "fence_redfish", "options": {"ip": "192.0.2.31", "username": "root"}}
PATHS = "/v1/hosts/node1/fence-paths"


async def set_connectivity(api: Api, host: str, connectivity: str) -> None:
    table = schema.host
    await api.write(
        lambda session: session.execute(table.update().where(table.c.id == api.ids[host]).values(connectivity=connectivity))
    )


async def everything_kept(api: Api) -> str:
    """Return every row of every table as text."""
    return "\n".join([str(row) for table in schema.metadata.sorted_tables for row in await api.rows(table)])


async def test_a_devices_secret_is_kept_encrypted_and_never_shown(api_on_each: Api) -> None:
    api = api_on_each
    put = await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE | {"secret": SECRET}]}, headers={"Idempotency-Key": KEY})
    assert put.status_code == 200, put.text
    (shown,) = put.json()["items"]
    assert (shown["name"], shown["order"], shown["has_secret"], shown["is_ready"]) == ("bmc", 1, True, False)
    assert shown["is_test_due"], "a fresh device is tested without being asked"
    for path in (PATHS, "/v1/fence-paths", "/v1/hosts/node1", "/v1/events", "/v1/audit"):
        assert SECRET not in (await api.call("admin", "GET", path)).text, path
    assert SECRET not in await everything_kept(api)
    (row,) = await api.db.read(failover.fence_paths)
    box = SecretBox(api.uploads_dir.parent)
    assert box.open(row.secret, place=place_of(row.host_id, "bmc")) == SECRET
    assert (api.uploads_dir.parent / "secrets.key").stat().st_mode & 0o777 == 0o600


KEY = "0b8f5c0e-6d2f-4b42-9a3e-7f1f3c1f9a11"


async def test_a_secret_stays_with_its_device_and_goes_to_no_other_place(api: Api) -> None:
    await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE | {"secret": SECRET}]})
    kept = await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE, {"name": "pdu", "agent": "fence_apc"}]})
    assert [(one["name"], one["order"], one["has_secret"]) for one in kept.json()["items"]] == [
        ("bmc", 1, True),
        ("pdu", 2, False),
    ]
    elsewhere = DEVICE | {"options": {"ip": "198.51.100.66", "username": "root"}}
    moved = await api.call("admin", "PUT", PATHS, json={"paths": [elsewhere]})
    assert moved.json()["items"][0]["has_secret"] is False, "else who may configure could have it sent to himself"


async def test_what_names_files_or_programs_of_the_controller_is_refused(api: Api) -> None:
    for options in ({"identity_file": "id_rsa"}, {"ipmitool-path": "x"}, {"debug": "x"}, {"password": "x"}):
        answer = await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE | {"options": options}]})
        assert (answer.status_code, answer.json()["code"]) == (400, "fence-option-refused"), options
    manual = await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE | {"agent": "fence_ack_manual"}]})
    assert manual.json()["code"] == "fence-agent-invalid"
    two_lines = await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE | {"secret": "x\naction=on"}]})
    assert two_lines.json()["code"] == "fence-secret-invalid"


async def test_a_test_is_asked_for_and_made_by_the_leader(api: Api) -> None:
    none = await api.call("fleet-operator", "POST", "/v1/hosts/node1:test-fence")
    assert (none.status_code, none.json()["code"]) == (409, "fence-not-configured")
    await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE]})
    now = api.clock.now()
    await api.write(lambda session: failover.record_test(session, api.ids["node1"], "bmc", power="on", message="", now=now))
    (ready,) = (await api.call("fleet-viewer", "GET", "/v1/fence-paths")).json()["items"]
    assert (ready["host"], ready["power"], ready["is_ready"], ready["is_test_due"]) == ("node1", "on", True, False)
    api.clock.turn(seconds=60)
    asked = await api.call("fleet-operator", "POST", "/v1/fence-paths:test")
    assert asked.status_code == 202
    assert [one["is_test_due"] for one in asked.json()["items"]] == [True]


async def test_a_host_shows_its_lease_its_warden_whom_it_would_kill_and_its_devices(api: Api) -> None:
    await place(api, "db", "node1", ha="restart")
    await place(api, "scratch", "node1")
    await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE]})
    shared = schema.pool.update().values(is_shared=True)
    await api.write(lambda session: session.execute(shared))
    guard = {"host_id": api.ids["node1"], "is_armed": True, "kill_ms": 4000, "updated_at": api.clock.now()}
    await api.write(lambda session: session.execute(schema.host_guard.insert().values(**guard)))
    await api.write(lambda session: session.execute(schema.host.update().values(boot_id="b7")))
    host = (await api.call("fleet-viewer", "GET", "/v1/hosts/node1")).json()
    assert host["boot_id"] == "b7"
    shown = host["protection"]
    assert shown["would_kill"] == ["db"]
    assert (shown["is_warden_armed"], shown["kill_s"], shown["best_proof"]) == (True, 4.0, "warden")
    assert [one["name"] for one in shown["fence_paths"]] == ["bmc"]
    (listed,) = [one for one in (await api.call("admin", "GET", "/v1/hosts")).json()["items"] if one["name"] == "node1"]
    assert listed["protection"] is None


async def test_a_host_shows_how_old_its_lease_and_its_beacon_are_and_how_its_devices_were_tested(api: Api) -> None:
    await api.equip()
    now, host_id = api.clock.now(), api.ids["node1"]
    before = (await api.call("fleet-viewer", "GET", "/v1/hosts/node1")).json()["protection"]
    assert (before["lease_age_s"], before["is_warden_armed"], before["beacon_pool"], before["best_proof"]) == (
        None,
        False,
        "",
        "none",
    )
    await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE, {"name": "pdu", "agent": "fence_apc"}]})

    def work(session: Any) -> None:
        failover.record_test(session, host_id, "bmc", power="on", message="", now=now)
        failover.record_test(session, host_id, "pdu", power="unknown", message="fence_apc did not answer within 30 s", now=now)
        guard = {"host_id": host_id, "is_armed": False, "kill_ms": 3000, "beacon_pool_id": api.ids["local"], "updated_at": now}
        session.execute(schema.host_guard.insert().values(**guard))
        session.execute(schema.host.update().where(schema.host.c.id == host_id).values(lease_number=7))
        intent = {"host_id": host_id, "term": 3, "number": 1, "lease_number": 7, "pool_id": api.ids["local"]}
        session.execute(schema.fence_intent.insert().values(**intent, via_host_id=api.ids["node2"], begun_at=now))

    await api.write(work)
    api.host_states[host_id] = {
        "at_ms": now.timestamp() * 1000,
        "warden_missing": ("the warden does not answer",),
        "beacon_age_ms": 1500,
        "clock_rate_ppm": -37,
        "beacon_problem": "Input/output error",
    }
    api.clock.turn(seconds=4)
    shown = (await api.call("fleet-viewer", "GET", "/v1/hosts/node1")).json()["protection"]
    assert (shown["lease_number"], shown["lease_age_s"]) == (7, 4.0)
    assert (shown["is_warden_armed"], shown["warden_missing"]) == (False, ["the warden does not answer"])
    assert (before["clock_rate_ppm"], shown["clock_rate_ppm"]) == (None, -37)
    assert (shown["beacon_pool"], shown["beacon_age_s"], shown["beacon_problem"]) == ("local", 5.5, "Input/output error")
    assert (shown["fence_intent"]["lease_number"], shown["fence_intent"]["written_at"]) == (7, None)
    tested = [(one["name"], one["power"], one["is_ready"], one["message"]) for one in shown["fence_paths"]]
    assert tested == [("bmc", "on", True, ""), ("pdu", "unknown", False, "fence_apc did not answer within 30 s")]
    assert all(one["tested_at"] for one in shown["fence_paths"])
    assert shown["best_proof"] == "power"


async def test_nobody_confirms_off_a_host_that_is_heard_and_everybody_gives_a_reason(api: Api) -> None:
    await set_connectivity(api, "node1", "up")
    refused = await api.call("admin", "POST", "/v1/hosts/node1:confirm-off", json={"reason": "I think so"})
    assert (refused.status_code, refused.json()["code"]) == (409, "host-is-heard")
    blank = await api.call("admin", "POST", "/v1/hosts/node1:confirm-off", json={"reason": "  "})
    assert blank.status_code == 400
    await set_connectivity(api, "node1", "lost")
    assert (await api.call("fleet-operator", "POST", "/v1/hosts/node1:confirm-off", json={"reason": "off"})).status_code == 403
    said = await api.call("admin", "POST", "/v1/hosts/node1:confirm-off", json={"reason": "pulled the plug"})
    assert said.status_code == 204
    status = (await api.call("fleet-viewer", "GET", "/v1/failover")).json()
    assert status["confirmed_off"] == [{"host": "node1", "by": "admin", "reason": "pulled the plug"}]
    assert [(one["host"], one["connectivity"]) for one in status["silent"]] == [("node1", "lost")]


async def test_failover_is_paused_resumed_and_a_host_released(api: Api) -> None:
    assert (await api.call("fleet-operator", "POST", "/v1/failover:pause")).status_code == 204
    paused = (await api.call("fleet-viewer", "GET", "/v1/failover")).json()
    assert (paused["is_active"], paused["is_paused"]) == (False, True)
    assert (await api.call("fleet-operator", "POST", "/v1/failover:resume")).status_code == 204
    frozen = "2 of 5 hosts are lost at once"
    await api.write(lambda session: failover.set_control(session, now=api.clock.now(), frozen=frozen))
    shown = (await api.call("fleet-viewer", "GET", "/v1/failover")).json()
    assert (shown["is_active"], shown["frozen"]) == (False, frozen)
    body = {"reason": "its rack burnt"}
    assert (await api.call("fleet-operator", "POST", "/v1/hosts/node1:release", json=body)).status_code == 403
    assert (await api.call("admin", "POST", "/v1/hosts/node1:release", json=body)).status_code == 204
    after = (await api.call("fleet-viewer", "GET", "/v1/failover")).json()
    assert after["released"] == [{"host": "node1", "by": "admin", "reason": "its rack burnt"}]


async def test_a_loss_is_told_from_suspicion_to_each_vms_restart_with_times(api_on_each: Api) -> None:
    api = api_on_each
    vm = await place(api, "db", "node1", ha="restart")
    identifier, began = mint("fo"), api.clock.now()

    def at(seconds: float) -> Any:
        return began + timedelta(seconds=seconds)

    evidence = [
        {"at": at(-4).isoformat(), "what": "no renewal for 6.1 s", "proof": ""},
        {"at": at(0).isoformat(), "what": "no renewal for 9.6 s", "proof": ""},
        {"at": at(2).isoformat(), "what": "switched off by bmc, and its status read back as off", "proof": "power_off"},
    ]

    def work(session: Any) -> None:
        values = {"state": "fenced", "proof": "power_off", "evidence": evidence, "fenced_at": at(2)}
        failover.write_record(session, api.ids["node1"], failover_id=identifier, now=began, **values)
        outcome = {"operation_id": "", "state": "running", "why": "", "ended_at": at(7.5)}
        failover.write_vm(session, identifier, vm["id"], now=at(2.5), **outcome)

    await api.write(work)
    (listed,) = (await api.call("fleet-viewer", "GET", "/v1/failovers?filter=host=node1")).json()["items"]
    assert (listed["id"], listed["state"], listed["vms"], listed["timeline"]) == (identifier, "fenced", {"running": 1}, [])
    shown = (await api.call("fleet-viewer", "GET", f"/v1/failovers/{identifier}")).json()
    told = [(one["what"], one["proof"], one["vm"]) for one in shown["timeline"]]
    assert told == [
        ("no renewal for 6.1 s", "", ""),
        ("no renewal for 9.6 s", "", ""),
        ("switched off by bmc, and its status read back as off", "power_off", ""),
        ("db: its restart begins", "", "db"),
        ("db: runs, 5.0 s later", "", "db"),
    ]
    (outcome,) = shown["outcomes"]
    assert (outcome["vm"], outcome["state"], outcome["seconds"]) == ("db", "running", 5.0)
    assert (await api.call("p1-admin", "GET", f"/v1/failovers/{identifier}")).status_code == 403
    gone = await api.call("fleet-viewer", "GET", "/v1/failovers/fo-00000000000000000000000000")
    assert (gone.status_code, gone.json()["code"]) == (404, "failover-not-found")


async def test_a_drill_tells_when_each_vm_would_run_again_and_changes_nothing(api: Api) -> None:
    await api.equip()
    await place(api, "db", "node1", ha="restart")
    await place(api, "scratch", "node1")
    await api.write(
        lambda session: session.execute(schema.pool.update().values(is_shared=True, sharing_proven_at=api.clock.now()))
    )
    blind = (await api.call("fleet-viewer", "GET", "/v1/hosts/node1/loss-drill")).json()
    told = {one["vm"]: (one["seconds"], one["why"]) for one in blind["outcomes"]}
    assert (blind["score"], blind["proof"]) == (0.0, "")
    assert "nothing proves its host off" in told["db"][1]
    assert "not kept" in told["scratch"][1]
    guard = {"host_id": api.ids["node1"], "is_armed": True, "kill_ms": 3000, "updated_at": api.clock.now()}
    await api.write(lambda session: session.execute(schema.host_guard.insert().values(**guard)))
    by_lease = (await api.call("fleet-viewer", "GET", "/v1/hosts/node1/loss-drill?boot_s=4")).json()
    assert by_lease["proof"] == "lease_bound", by_lease
    assert by_lease["fenced_s"] > 19, "the lease is waited out"
    await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE]})
    now = api.clock.now()
    await api.write(lambda session: failover.record_test(session, api.ids["node1"], "bmc", power="on", message="", now=now))
    by_power = (await api.call("fleet-viewer", "GET", "/v1/hosts/node1/loss-drill?boot_s=4")).json()
    assert (by_power["proof"], by_power["score"]) == ("power_off", 100.0), by_power
    assert by_power["max_s"] < by_lease["max_s"]
    assert await api.rows(schema.failover) == []
    await set_connectivity(api, "node1", "lost")
    late = await api.call("fleet-viewer", "GET", "/v1/hosts/node1/loss-drill")
    assert (late.status_code, late.json()["code"]) == (409, "host-not-up")


async def test_a_drill_starts_a_group_in_order_and_names_who_is_waited_for(api: Api) -> None:
    await api.equip()
    await place(api, "db", "node1", ha="restart", start_group="shop", start_order=1)
    await place(api, "web", "node1", ha="restart", start_group="shop", start_order=2, start_delay_s=20, priority=10)
    await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE]})
    now = api.clock.now()
    await api.write(lambda session: failover.record_test(session, api.ids["node1"], "bmc", power="on", message="", now=now))
    local = (await api.call("fleet-viewer", "GET", "/v1/hosts/node1/loss-drill?boot_s=4")).json()
    assert all(one["seconds"] is None for one in local["outcomes"]), "their disks are on node1 alone"
    await api.write(lambda session: session.execute(schema.pool.update().values(is_shared=True, sharing_proven_at=now)))
    played = (await api.call("fleet-viewer", "GET", "/v1/hosts/node1/loss-drill?boot_s=4")).json()
    seconds = {one["vm"]: one["seconds"] for one in played["outcomes"]}
    assert seconds["web"] >= seconds["db"] + 20, played
    (db,) = await api.rows(schema.vm, name="db")
    await api.set_vm(db["id"], host_selector={"rack": "none"})
    full = (await api.call("fleet-viewer", "GET", "/v1/hosts/node1/loss-drill?boot_s=4")).json()
    assert {one["vm"]: one["why"] for one in full["outcomes"]}["web"] == "waits for db, which starts earlier in group shop", full


async def test_a_real_drill_is_refused_where_no_device_is_ready_the_name_differs_or_a_vm_would_not_run_again(api: Api) -> None:
    await api.equip()
    await place(api, "db", "node1", ha="restart")
    await api.write(
        lambda session: session.execute(schema.pool.update().values(is_shared=True, sharing_proven_at=api.clock.now()))
    )

    async def cut(**said: object) -> tuple[int, str]:
        answer = await api.call("admin", "POST", "/v1/hosts/node1:cut-power", json={"confirm": "node1", **said})
        return answer.status_code, answer.json()["code"] if answer.content else ""

    assert await cut() == (409, "fence-path-missing")
    await api.call("admin", "PUT", PATHS, json={"paths": [DEVICE]})
    now = api.clock.now()
    await api.write(lambda session: failover.record_test(session, api.ids["node1"], "bmc", power="on", message="", now=now))
    assert await cut(confirm="node2") == (400, "confirm-differs")
    await place(api, "scratch", "node1")
    assert await cut() == (409, "drill-would-lose"), "scratch is not kept"
    assert await api.rows(schema.power_cut) == []
    assert (await api.call("fleet-operator", "POST", "/v1/hosts/node1:cut-power", json={"confirm": "node1"})).status_code == 403
    assert await cut(force=True) == (204, "")
    (asked,) = await api.rows(schema.power_cut)
    assert asked["host_id"] == api.ids["node1"]

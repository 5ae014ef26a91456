"""Lists and single resources, in every form of output."""

import json
from datetime import UTC, datetime, timedelta

import pytest
import yaml

from tests.unit.cli.conftest import Trimtab
from tests.unit.cli.fake_controller import TOKEN, Answer, FakeController, decision, host, operation, page, problem, vm

VMS = "/v1/projects/default/vms"


def test_list_shows_state_with_its_age_and_unknown_as_unknown(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", VMS, page(vm("web1"), vm("web2", state="unknown", age_s=None)))
    found = trimtab("vm", "list")
    assert found.code == 0
    assert found.err == ""
    title, first, second = found.out.splitlines()
    assert title.split() == ["NAME", "STATE", "OBSERVED", "HOST", "VCPUS", "MEMORY", "ADDRESSES", "ACTIVITY"]
    assert first.split() == ["web1", "running", "3s", "ago", "node1", "2", "2", "GiB", "10.0.0.5"]
    assert second.split()[:3] == ["web2", "unknown", "never"]
    assert controller.seen[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_list_reads_every_page_over_one_connection(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", VMS, page(vm("a"), token="t1"), page(vm("b"), token="t2"), page(vm("c")))
    assert trimtab("vm", "list", "-o", "name").out.split() == ["a", "b", "c"]
    assert [one.query.get("page_token", "") for one in controller.seen] == ["", "t1", "t2"]
    assert len({one.connection for one in controller.seen}) == 1


def test_a_table_asks_for_the_part_that_it_shows_and_reads_every_page(trimtab: Trimtab, controller: FakeController) -> None:
    pages = [page(vm("a"), token="t1"), page(vm("b"), token="t2"), page(vm("c"))]
    controller.on("GET", VMS, *pages)
    assert [line.split()[0] for line in trimtab("vm", "list").out.splitlines()] == ["NAME", "a", "b", "c"]
    assert [one.query.get("view") for one in controller.seen] == ["basic"] * 3
    assert [one.query.get("page_token", "") for one in controller.seen] == ["", "t1", "t2"]


@pytest.mark.parametrize("options", [("-o", "json"), ("-o", "yaml"), ("-c", "name,shape.os")])
def test_what_may_show_any_field_asks_for_all(trimtab: Trimtab, controller: FakeController, options: tuple[str, str]) -> None:
    controller.on("GET", VMS, page(vm("a")))
    assert trimtab("vm", "list", *options).code == 0
    assert controller.seen[0].query.get("view") is None


def test_a_refused_later_page_is_told_and_nothing_is_printed(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", VMS, page(vm("a"), token="t1"), problem(400, "page-token", "invalid", "start again"))
    found = trimtab("vm", "list")
    assert (found.out, "start again" in found.err) == ("", True)
    assert found.code != 0


def test_list_leaves_nothing_out_of_a_page_that_is_larger_than_asked_for(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", VMS, page(*[vm(f"v{i}") for i in range(1200)]))
    assert len(trimtab("vm", "list", "-o", "name").out.split()) == 1200


def test_list_stops_at_its_limit(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", VMS, page(vm("a"), vm("b"), token="t1"), page(vm("c")))
    assert trimtab("vm", "list", "-o", "name", "--limit", "2").out.split() == ["a", "b"]
    assert [one.query["page_size"] for one in controller.seen] == ["2"]


def test_list_passes_selector_filter_order_and_project_on(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/projects/shop/vms", page())
    options = ("-p", "shop", "-l", "tier=web,zone=a", "-l", "x=y", "--filter", "state=running", "--sort-by", "-created_at")
    found = trimtab("vm", "list", *options)
    assert (found.code, found.out) == (0, "")
    assert "no vms in project shop" in found.err
    query = controller.seen[0].query
    assert query["selector"] == "tier=web,zone=a,x=y"
    assert query["filter"] == "state=running"
    assert query["order_by"] == "created_at desc"


def test_options_may_stand_before_the_noun(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/projects/shop/vms", page(vm()))
    assert json.loads(trimtab("-p", "shop", "-o", "json", "vm", "list").out)[0]["name"] == "web1"


def test_machine_output_is_the_document_of_the_api(trimtab: Trimtab, controller: FakeController) -> None:
    long = vm(problem="x" * 500)
    controller.on("GET", VMS, page(long))
    controller.on("GET", f"{VMS}/web1", Answer(long))
    assert json.loads(trimtab("vm", "list", "-o", "json").out) == [long]
    assert yaml.safe_load(trimtab("vm", "list", "-o", "yaml").out) == [long]
    assert json.loads(trimtab("vm", "get", "web1", "-o", "json").out) == long
    assert yaml.safe_load(trimtab("vm", "get", "web1", "-o", "yaml").out) == long


def test_an_empty_list_is_an_empty_list_to_machines(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", VMS, page())
    assert json.loads(trimtab("vm", "list", "-o", "json").out) == []
    assert trimtab("vm", "list", "-o", "name").out == ""


def test_columns_may_be_paths(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", VMS, page(vm()))
    found = trimtab("vm", "list", "-c", "name,labels.tier,shape.machine")
    assert [line.split() for line in found.out.splitlines()] == [
        ["NAME", "LABELS.TIER", "SHAPE.MACHINE"],
        ["web1", "web", "pc-q35-7.2"],
    ]
    machine = trimtab("vm", "list", "-c", "name,labels.tier,labels.absent,memory", "-o", "json")
    assert json.loads(machine.out) == [{"name": "web1", "labels.tier": "web", "labels.absent": None, "memory": 2048}]


def test_a_column_that_is_nowhere_is_refused(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", VMS, page(vm()))
    found = trimtab("vm", "list", "-c", "name,hots")
    assert found.code == 2
    assert "'hots'" in found.err
    assert "host" in found.err


def test_control_characters_of_a_guest_do_not_reach_the_terminal(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", VMS, page(vm(problem="bad\x1b]0;owned\x07\nline")))
    found = trimtab("vm", "list")
    assert "\x1b" not in found.out
    assert len(found.out.splitlines()) == 2


def test_get_describes_a_vm(trimtab: Trimtab, controller: FakeController) -> None:
    live = operation("running", kind="vm.migrate", progress={"percent": 43.0, "done_bytes": 0, "total_bytes": 0})
    controller.on("GET", f"{VMS}/web1", Answer(vm(operation=live)))
    out = trimtab("vm", "get", "web1").out
    assert "running on node1, observed 3s ago" in out
    assert "2 vcpus, 2 GiB (up to 4 vcpus)" in out
    assert "vm.migrate running 43%" in out
    assert "52:54:00:00:00:01" in out
    assert "20 GiB" in out


@pytest.mark.parametrize(("issued_h_ago", "left_h", "is_flagged"), [(1, 23, False), (13, 11, False), (18, 6, True)])
def test_a_certificate_is_called_overdue_by_its_own_life(
    trimtab: Trimtab, controller: FakeController, issued_h_ago: int, left_h: int, is_flagged: bool
) -> None:
    now = datetime.now(UTC)
    lived = {"issued_at": now - timedelta(hours=issued_h_ago), "not_after": now + timedelta(hours=left_h)}
    dates = {name: at.isoformat() for name, at in lived.items()}
    controller.on("GET", "/v1/hosts/node1", Answer(host(certificates=[{"purpose": "agent", "serial": "0a", **dates}])))
    assert ("not renewed?" in trimtab("host", "get", "node1").out) == is_flagged


def test_a_host_that_somebody_holds_says_who_and_for_which_tour(trimtab: Trimtab, controller: FakeController) -> None:
    held = {"plan": "plan-7", "by": "ann", "since": (datetime.now(UTC) - timedelta(minutes=5)).isoformat()}
    controller.on("GET", "/v1/hosts/node1", Answer(host(is_cordoned=True, maintenance=held)))
    lines = [" ".join(line.split()) for line in trimtab("host", "get", "node1").out.splitlines()]
    assert any(line.startswith("state up, in maintenance") for line in lines), lines
    assert "maintenance held by ann since 5m ago, plan-7" in lines


def test_host_get_shows_capacity_certificates_connectivity_and_capabilities(trimtab: Trimtab, controller: FakeController) -> None:
    lapsed = {"purpose": "libvirt", "serial": "0b", "not_after": "2020-01-01T00:00:00+00:00"}
    controller.on("GET", "/v1/hosts/node1", Answer(host(is_cordoned=True, certificates=[*host()["certificates"], lapsed])))
    out = trimtab("host", "get", "node1").out
    assert "up, cordoned since" in out
    assert "1s ago" in out
    assert "██████████░░░░░░░░░░  50%  8 of 16 used, 8 free, of it 2 unmanaged" in out
    assert "1 GiB of 4 GiB used, 3 GiB free" in out
    assert "expires in" in out
    assert "EXPIRED" in out
    assert "tcg" in out
    assert "br0 (mtu 1500)" in out


def test_a_host_that_was_never_heard_of_is_unknown(trimtab: Trimtab, controller: FakeController) -> None:
    silent = host(connectivity="new", heard_at=None, heard_age_s=None, inventory=None, inventory_at=None)
    controller.on("GET", "/v1/hosts/node1", Answer(silent))
    controller.on("GET", "/v1/hosts", page(silent))
    described = [line.split() for line in trimtab("host", "get", "node1").out.splitlines()]
    assert ["heard", "of", "unknown"] in described
    assert ["unknown:", "the", "host", "has", "sent", "no", "inventory", "yet"] in described
    assert trimtab("host", "list").out.splitlines()[1].split()[:3] == ["node1", "new", "unknown"]


def test_a_host_that_lives_and_lacks_something_says_what_and_since_when(trimtab: Trimtab, controller: FakeController) -> None:
    carrier = {
        "kind": "network-degraded",
        "message": "bridge br-guest has lost its carrier",
        "since": "2020-11-20T14:02:11+00:00",
    }
    pool = {"kind": "storage-lost", "message": "pool shared does not answer", "since": None}
    degraded = host(troubles=[carrier, pool])
    controller.on("GET", "/v1/hosts/node1", Answer(degraded))
    controller.on("GET", "/v1/hosts", page(degraded, host("node2")))
    said = "network-degraded: bridge br-guest has lost its carrier since 2020-11-20 14:02 UTC"
    described = trimtab("host", "get", "node1").out
    assert said in described
    assert "storage lost: pool shared does not answer" in described
    _header, first, second = trimtab("host", "list").out.splitlines()
    assert f"{said}; storage lost: pool shared does not answer" in first
    assert "lost" not in second


def test_explain_shows_the_chosen_host_first_and_each_reason(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", f"{VMS}/web1:explain", Answer(decision()))
    lines = trimtab("vm", "explain", "web1").out.splitlines()
    assert lines[0] == "web1: node2"
    assert lines[1] == "node2 leaves the least memory over; 2 of 3 hosts fit"
    assert lines[2].endswith(" by policy best-fit, on what events up to 812 told")
    rows = [line.split() for line in lines if line.startswith(("chosen", "fits", "refused", " "))]
    assert rows[0] == ["chosen", "node2", "0.820", "best-fit", "0.820"]
    assert rows[1][:3] == ["fits", "node1", "0.410"]
    assert rows[2] == ["refused", "node3", "-", "memory:", "needs", "2048", "MiB,", "512", "MiB", "free", "[memory-short]"]
    assert rows[3] == ["cordon:", "the", "host", "is", "cordoned", "[host-cordoned]"]


def test_explain_why_not_answers_about_one_host(trimtab: Trimtab, controller: FakeController) -> None:
    only = [one for one in decision()["verdicts"] if one["host"] == "node3"]
    controller.on("GET", f"{VMS}/web1:explain", Answer(decision(verdicts=only, why_not="node3 does not fit: it is cordoned")))
    found = trimtab("vm", "explain", "web1", "--why-not", "node3")
    assert controller.seen[0].query == {"why_not": "node3"}
    assert found.out.splitlines()[0] == "node3 does not fit: it is cordoned"
    assert "  memory: needs 2048 MiB, 512 MiB free [memory-short]" in found.out


@pytest.mark.parametrize(
    ("host_name", "expected"),
    [
        ("node1", "node1 fits web1 and scored 0.410; node2 scored 0.820"),
        ("node2", "web1 is on node2: it was chosen"),
        ("node3", "node3 does not fit web1:"),
        ("node9", "node9 is not among the hosts kept of the last decision about web1"),
    ],
)
def test_explain_why_not_words_the_verdicts_itself_where_no_sentence_came(
    trimtab: Trimtab, controller: FakeController, host_name: str, expected: str
) -> None:
    controller.on("GET", f"{VMS}/web1:explain", Answer(decision()))
    assert trimtab("vm", "explain", "web1", "--why-not", host_name).out.splitlines()[0] == expected


def test_operation_explain_shows_the_refusal_of_a_vm_that_is_gone(trimtab: Trimtab, controller: FakeController) -> None:
    refused = decision(host="", summary="no host fits", verdicts=decision()["verdicts"][2:])
    controller.on("GET", "/v1/operations/op-01:explain", Answer({"operation": operation("failed"), "placement": refused}))
    out = trimtab("op", "explain", "op-01").out
    assert out.splitlines()[0] == "web1: no host fits"
    assert "memory-short" in out


def test_operation_get_shows_its_steps(trimtab: Trimtab, controller: FakeController) -> None:
    step = {"step": "place", "direction": "do", "outcome": "failed", "at": "2026-11-20T02:00:01+00:00"}
    error = {"kind": "no_capacity", "code": "no-host-fits", "message": "no host fits", "context": {}}
    controller.on("GET", "/v1/operations/op-01", Answer(operation("failed", error=error, steps=[{**step, "error": error}])))
    out = trimtab("op", "get", "op-01").out
    assert "no host fits [no-host-fits]" in out
    assert "place  do         failed" in out
    assert "took" in out


LISTS = {
    "host list": ("/v1/hosts", host()),
    "host-class list": ("/v1/host-classes", {"id": "hc-1", "name": "default", "vcpu_ratio_permille": 4000, "policy": "best-fit"}),
    "host token list": ("/v1/host-tokens", {"id": "join-1", "name": "node4", "expires_at": "2199-01-01T00:00:00+00:00"}),
    "pool list": (
        "/v1/pools",
        {"id": "pool-1", "name": "local", "space": {"capacity_bytes": 1 << 40, "available_bytes": 1 << 30}},
    ),
    "network list": ("/v1/projects/default/networks", {"id": "net-1", "name": "default", "is_shared": True, "hosts": []}),
    "network list --shared": ("/v1/networks", {"id": "net-1", "name": "default", "is_shared": True, "hosts": []}),
    "image list": (
        "/v1/projects/default/images",
        {"id": "img-1", "name": "debian", "virtual_size_bytes": 2 << 30, "replicas": []},
    ),
    "volume list": ("/v1/projects/default/volumes", {"id": "vol-1", "name": "data", "size_bytes": 1 << 30}),
    "project list": (
        "/v1/projects",
        {"id": "proj-1", "name": "shop", "quotas": {"vms": {"quota": 10, "used": 3}, "vcpus": {"quota": None, "used": 8}}},
    ),
    "user list": ("/v1/users", {"id": "user-1", "name": "ann", "kind": "user", "roles": {"*": "admin"}}),
    "token list --user ann": ("/v1/users/ann/tokens", {"id": "tok-1", "name": "cli", "expires_at": None}),
    "audit list": ("/v1/audit", {"seq": 7, "actor": "ann", "verb": "vm.delete", "outcome": "accepted"}),
    "op list": ("/v1/projects/default/operations", operation()),
    "op list -A": ("/v1/operations", operation()),
    "event list": ("/v1/projects/default/events", {"seq": 9, "kind": "vm.created", "subject": {"id": "vm-1", "name": "web1"}}),
}


@pytest.mark.parametrize("line", LISTS)
@pytest.mark.parametrize("output", ["table", "wide", "json", "yaml", "name"])
def test_every_noun_lists_in_every_form(trimtab: Trimtab, controller: FakeController, line: str, output: str) -> None:
    path, item = LISTS[line]
    controller.on("GET", path, page(item))
    found = trimtab(*line.split(), "-o", output)
    assert (found.code, found.err) == (0, "")
    match output:
        case "json":
            assert json.loads(found.out) == [item]
        case "yaml":
            assert yaml.safe_load(found.out) == [item]
        case "name":
            assert found.out.strip() == str(item.get("name") or item.get("id") or item.get("seq"))
        case _:
            assert len(found.out.splitlines()) == 2


GETS = {
    "host get x": "/v1/hosts/x",
    "host-class get x": "/v1/host-classes/x",
    "pool get x": "/v1/pools/x",
    "network get x": "/v1/projects/default/networks/x",
    "image get x": "/v1/projects/default/images/x",
    "volume get x": "/v1/projects/default/volumes/x",
    "vm get x": "/v1/projects/default/vms/x",
    "project get x": "/v1/projects/x",
    "user get x": "/v1/users/x",
    "op get x": "/v1/operations/x",
}


@pytest.mark.parametrize("line", GETS)
def test_every_noun_gets_one(trimtab: Trimtab, controller: FakeController, line: str) -> None:
    item = {"id": "some-id", "name": "x"}
    controller.on("GET", GETS[line], Answer(item))
    assert json.loads(trimtab(*line.split(), "-o", "json").out) == item
    described = trimtab(*line.split())
    assert described.code == 0
    assert "some-id" in described.out


@pytest.mark.parametrize("line", GETS)
def test_every_missing_one_has_exit_code_4(trimtab: Trimtab, controller: FakeController, line: str) -> None:
    controller.on("GET", GETS[line], problem(404, "thing-not-found", "not_found", "there is no x"))
    found = trimtab(*line.split())
    assert found.code == 4
    assert found.err.splitlines() == ["error: there is no x", "code: thing-not-found  request: req-0f1e2d"]


def test_names_are_escaped_in_paths(trimtab: Trimtab, controller: FakeController) -> None:
    assert trimtab("vm", "get", "../hosts/a b?x").code == 4
    assert controller.seen[0].path == "/v1/projects/default/vms/..%2Fhosts%2Fa%20b%3Fx"


def test_pool_get_shows_space_and_unknown_where_it_was_not_observed(trimtab: Trimtab, controller: FakeController) -> None:
    space = {
        "capacity_bytes": 100 << 30,
        "available_bytes": 25 << 30,
        "claimed_bytes": 0,
        "observed_at": "2026-11-20T02:00:00+00:00",
    }
    hosts = [
        {"host": "node1", "state": "ready", "problem": "", "observed_at": None, "space": space},
        {"host": "node2", "state": "unknown", "problem": "not mounted", "observed_at": None, "space": None},
    ]
    controller.on("GET", "/v1/pools/fast", Answer({"id": "pool-1", "name": "fast", "space": space, "hosts": hosts}))
    out = trimtab("pool", "get", "fast").out
    assert "75%  25 GiB of 100 GiB free, observed" in out
    assert [line.split() for line in out.splitlines() if line.startswith("node2")] == [
        ["node2", "unknown", "unknown", "not", "mounted"]
    ]


def test_whoami_says_where_and_with_which_roles(trimtab: Trimtab, controller: FakeController) -> None:
    user = {"id": "user-1", "name": "ann", "kind": "user", "roles": {"*": "admin"}}
    controller.on("GET", "/v1/whoami", Answer({"name": "ann", "user": user, "token": {"name": "cli", "expires_at": None}}))
    found = trimtab("whoami")
    assert "*=admin" in found.out
    assert f"at {controller.url}, project default" in found.err
    assert trimtab("whoami", "-o", "name").out == "ann\n"


def test_audit_names_its_filters_and_times(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/audit", page())
    found = trimtab(
        "audit", "list", "--actor", "ann", "--outcome", "denied", "--since", "2026-11-20T02:00Z", "--filter", "verb=vm.delete"
    )
    assert found.code == 0
    query = controller.seen[0].query
    assert query["filter"] == "actor=ann,outcome=denied,verb=vm.delete"
    assert query["since"] == "2026-11-20T02:00:00+00:00"

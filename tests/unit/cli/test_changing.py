"""Mutations: what is sent, how operations are waited for, and what comes out."""

import json
import uuid
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Trimtab
from tests.unit.cli.fake_controller import Answer, FakeController, decision, host, operation, page, problem, vm

VMS = "/v1/projects/default/vms"
WAIT = "/v1/operations/op-01:wait"
PROGRESS = {
    "done_bytes": 512 << 20, "total_bytes": 1 << 30, "rate_bytes_s": 210 << 20, "phase": "memory", "remaining_s": 3, "percent": 50.0,
}  # fmt: skip


def accept(controller: FakeController, method: str, path: str, **fields: object) -> None:
    """Answer a long verb with an operation that runs, then is done."""
    controller.on(method, path, Answer({"operation": operation("queued", **fields)}, status=202))
    controller.on("GET", WAIT, Answer(operation("running", progress=PROGRESS, **fields)), Answer(operation("done", **fields)))


def test_create_sends_every_field_waits_and_says_where_it_runs(
    trimtab: Trimtab, controller: FakeController, tmp_path: Path
) -> None:
    accept(controller, "POST", VMS)
    controller.on("GET", f"{VMS}/web1", Answer(vm()))
    user_data, key = tmp_path / "user.yaml", tmp_path / "id.pub"
    user_data.write_text("#cloud-config\n")
    key.write_text("# mine\nssh-ed25519 AAAA ann\n\nssh-ed25519 BBBB bob\n")
    line = (
        "vm create web1 --image debian --vcpus 2 --vcpus-max 4 --memory 96MiB --memory-max 2GiB --disk 20GiB --pool fast "
        "--network front,mac=52:54:00:12:34:56,ip=10.0.0.5 --network back --firmware uefi --arch x86_64 --cpu-model qemu64 "
        "--host-class big --select rack=r2 --label tier=web --to node1 --hostname web --no-start --wait"
    )
    found = trimtab(*line.split(), "--user-data", str(user_data), "--ssh-key", str(key))
    assert found.code == 0
    assert found.out == "vm web1 is running on node1 (observed 3s ago)\n"
    assert "memory" in found.err
    assert "512 MiB of 1 GiB  210 MiB/s  3s left" in found.err
    assert controller.asked("POST", VMS)[0].document == {
        "name": "web1",
        "image": "debian",
        "vcpus": 2,
        "vcpus_max": 4,
        "memory_mib": 96,
        "memory_max_mib": 2048,
        "disk_bytes": 20 << 30,
        "pool": "fast",
        "networks": [{"network": "front", "mac": "52:54:00:12:34:56", "ip": "10.0.0.5"}, {"network": "back"}],
        "firmware": "uefi",
        "arch": "x86_64",
        "cpu_model": "qemu64",
        "host_class": "big",
        "host_selector": {"rack": "r2"},
        "labels": {"tier": "web"},
        "to_host": "node1",
        "seed": {
            "hostname": "web",
            "user_data": "#cloud-config\n",
            "ssh_keys": ["ssh-ed25519 AAAA ann", "ssh-ed25519 BBBB bob"],
        },
        "start": False,
    }


def test_create_sends_nothing_that_was_not_said(trimtab: Trimtab, controller: FakeController) -> None:
    accept(controller, "POST", VMS)
    controller.on("GET", f"{VMS}/web1", Answer(vm()))
    assert trimtab("vm", "create", "web1", "--image", "debian", "--memory", "2G", "-o", "name").out == "web1\n"
    assert controller.asked("POST", VMS)[0].document == {
        "name": "web1", "image": "debian", "vcpus": 1, "memory_mib": 2048, "start": True,
    }  # fmt: skip


def test_memory_that_the_system_chose_is_in_the_answer(trimtab: Trimtab, controller: FakeController) -> None:
    accept(controller, "POST", VMS)
    controller.on("GET", f"{VMS}/web1", Answer(vm()))
    chosen = trimtab("vm", "create", "web1", "--image", "debian", "--os", "linux")
    assert chosen.out == "vm web1 is running on node1 (observed 3s ago); 2 GiB of memory, as linux wants\n"
    said = trimtab("vm", "create", "web1", "--image", "debian", "--os", "linux", "--memory", "2GiB")
    assert said.out == "vm web1 is running on node1 (observed 3s ago)\n"


def test_no_wait_prints_the_operation_and_asks_no_more(trimtab: Trimtab, controller: FakeController) -> None:
    accept(controller, "POST", f"{VMS}/web1:start")
    assert trimtab("vm", "start", "web1", "--no-wait").out == "op-01\n"
    assert json.loads(trimtab("vm", "start", "web1", "--no-wait", "-o", "json").out)["id"] == "op-01"
    assert controller.asked("GET", WAIT) == []


def test_machine_output_after_waiting_is_the_subject(trimtab: Trimtab, controller: FakeController) -> None:
    accept(controller, "POST", f"{VMS}/web1:migrate")
    controller.on("GET", f"{VMS}/web1", Answer(vm(host="node2")))
    found = trimtab("vm", "migrate", "web1", "--to", "node2", "--bandwidth", "100", "--give-up-after", "30m", "-o", "json")
    assert json.loads(found.out)["host"] == "node2"
    assert controller.asked("POST", f"{VMS}/web1:migrate")[0].document == {
        "to_host": "node2", "bandwidth_mib_s": 100, "timeout_s": 1800,
    }  # fmt: skip


VERBS = {
    "vm start web1": ("POST", f"{VMS}/web1:start", {}),
    "vm stop web1": ("POST", f"{VMS}/web1:stop", {}),
    "vm stop web1 --force --grace 90s": ("POST", f"{VMS}/web1:stop", {"force": True, "timeout_s": 90}),
    "vm reboot web1": ("POST", f"{VMS}/web1:reboot", {}),
    "vm reboot web1 --force": ("POST", f"{VMS}/web1:reboot", {"force": True}),
    "vm pause web1": ("POST", f"{VMS}/web1:pause", {}),
    "vm resume web1": ("POST", f"{VMS}/web1:resume", {}),
    "vm migrate web1": ("POST", f"{VMS}/web1:migrate", {}),
    "vm migrate web1 --auto-converge --allow-postcopy": (
        "POST", f"{VMS}/web1:migrate", {"auto_converge": True, "allow_postcopy": True}
    ),
    "vm resize web1 --vcpus 4 --memory 2GiB": ("POST", f"{VMS}/web1:resize", {"vcpus": 4, "memory_mib": 2048}),
    "vm resize web1 --vcpus 4 --live": ("POST", f"{VMS}/web1:resize", {"vcpus": 4, "when": "live"}),
    "vm resize web1 --memory 2GiB --at next-stop": ("POST", f"{VMS}/web1:resize", {"memory_mib": 2048, "when": "next-stop"}),
    "vm attach web1 --volume data1": ("POST", f"{VMS}/web1:attach", {"volume": "data1"}),
    "vm attach web1 --network lan,ip=10.0.0.5": (
        "POST", f"{VMS}/web1:attach", {"network": {"network": "lan", "ip": "10.0.0.5"}}
    ),
    "vm attach web1 --volume data1 --network lan": (
        "POST", f"{VMS}/web1:attach", {"volume": "data1", "network": {"network": "lan"}}
    ),
    "vm detach web1 --volume data1": ("POST", f"{VMS}/web1:detach", {"volume": "data1"}),
    "vm detach web1 --nic nic-1": ("POST", f"{VMS}/web1:detach", {"nic": "nic-1"}),
    "vm cdrom web1 --iso virtio-win": ("POST", f"{VMS}/web1:cdrom", {"iso": "virtio-win"}),
    "vm cdrom web1 --eject": ("POST", f"{VMS}/web1:cdrom", {"iso": ""}),
    "vm create win1 --iso win11 --os win11 --disk 60GiB --memory 4GiB --tpm --secure-boot": (
        "POST",
        VMS,
        {
            "name": "win1", "iso": "win11", "os": "win11", "disk_bytes": 60 << 30, "memory_mib": 4096, "tpm": True,
            "secure_boot": True, "vcpus": 1, "start": True,
        },
    ),
    "vm create win1 --iso win11 --os windows --disk 60GiB --tpm --secure-boot": (
        "POST",
        VMS,
        {
            "name": "win1", "iso": "win11", "os": "windows", "disk_bytes": 60 << 30, "tpm": True, "secure_boot": True, "vcpus": 1,
            "start": True,
        },
    ),
    "volume limit data --iops 500 --bandwidth 0": (
        "POST", "/v1/projects/default/volumes/data:limit", {"iops": 500, "bandwidth_mib_s": 0}
    ),
    "volume resize data 2GiB": ("POST", "/v1/projects/default/volumes/data:resize", {"size_bytes": 2 << 30}),
    "vm undelete web1": ("POST", f"{VMS}/web1:undelete", {}),
    "vm purge web1 --yes": ("POST", f"{VMS}/web1:purge", {}),
    "vm delete web1 --yes": ("DELETE", f"{VMS}/web1", None),
    "host reboot node1 --yes": ("POST", "/v1/hosts/node1:reboot", None),
    "host remove node1 --yes": ("DELETE", "/v1/hosts/node1", None),
    "image delete debian --yes": ("DELETE", "/v1/projects/default/images/debian", None),
    "volume undelete data": ("POST", "/v1/projects/default/volumes/data:undelete", None),
    "volume purge data --yes": ("POST", "/v1/projects/default/volumes/data:purge", None),
    "vm snapshot create web1 before --memory": ("POST", f"{VMS}/web1/snapshots", {"name": "before", "has_memory": True}),
    "vm snapshot revert web1 before --disk-only --yes": ("POST", f"{VMS}/web1/snapshots/before:revert", {"disk_only": True}),
    "vm snapshot delete web1 before --yes": ("DELETE", f"{VMS}/web1/snapshots/before", None),
    "vm clone web1 web2 --linked --snapshot before --no-start": (
        "POST", f"{VMS}/web1:clone", {"name": "web2", "linked": True, "start": False, "snapshot": "before"}
    ),
    "template create web --from web1": ("POST", "/v1/projects/default/templates", {"name": "web", "from_vm": "web1"}),
    "template delete web --revision 2 --yes": ("DELETE", "/v1/projects/default/templates/web", None),
    "vm create --template web@2 --count 20 --name-pattern web-{n}": (
        "POST",
        "/v1/projects/default/templates/web:create-vms",
        {"name_pattern": "web-{n}", "count": 20, "start": True, "revision": 2},
    ),
    "backup run db --repo main --bandwidth 50 --needs-application": (
        "POST",
        "/v1/projects/default/backups",
        {"vm": "db", "repo": "main", "bandwidth_mib_s": 50, "needs_application": True},
    ),
    "backup restore bk-1 --as db2 --to node3 --pool fast=local --network lan=lan2 --cpu-model qemu64 --no-start": (
        "POST",
        "/v1/projects/default/backups/bk-1:restore",
        {"name": "db2", "to_host": "node3", "pools": {"fast": "local"}, "networks": {"lan": "lan2"}, "cpu_model": "qemu64",
         "start": False},
    ),
    "backup restore bk-1 --as db2 --instant --bandwidth 50 --cpu-model auto": (
        "POST",
        "/v1/projects/default/backups/bk-1:restore",
        {"name": "db2", "cpu_model": "auto", "instant": True, "bandwidth_mib_s": 50},
    ),
    "backup restore bk-1 --replace db --yes": ("POST", "/v1/projects/default/backups/bk-1:replace", {"vm": "db"}),
    "backup instant create before --vm db --vm web --needs-application": (
        "POST", "/v1/projects/default/backup-instants", {"name": "before", "vms": ["db", "web"], "needs_application": True}
    ),
    "backup prune --repo main": ("POST", "/v1/backup-repos/main:prune", {}),
    "backup prune --repo main --dry-run": ("POST", "/v1/backup-repos/main:prune", {"dry_run": True}),
    "volume delete data --yes": ("DELETE", "/v1/projects/default/volumes/data", None),
    "pool delete fast --yes": ("DELETE", "/v1/pools/fast", None),
    "network delete front --yes": ("DELETE", "/v1/projects/default/networks/front", None),
    "network delete front --shared --yes": ("DELETE", "/v1/networks/front", None),
    "pool create fast --path /srv/fast --shared": (
        "POST", "/v1/pools", {"name": "fast", "kind": "dir", "path": "/srv/fast", "is_shared": True}
    ),
    "volume create data --size 1GiB --pool fast": (
        "POST", "/v1/projects/default/volumes", {"name": "data", "size_bytes": 1 << 30, "pool": "fast"}
    ),
    "network create front --bridge br0 --bridge-on node1=br1 --vlan 7 --mtu 9000": (
        "POST",
        "/v1/projects/default/networks",
        {"name": "front", "kind": "bridge", "bridge": "br0", "bridges": {"node1": "br1"}, "vlan": 7, "mtu": 9000},
    ),
    "network create lab --nat --subnet 10.20.0.0/24 --dhcp --shared": (
        "POST", "/v1/networks", {"name": "lab", "kind": "nat", "subnet": "10.20.0.0/24", "dhcp": True}
    ),
    "network create app --overlay --subnet 10.30.0.0/24 --dhcp": (
        "POST",
        "/v1/projects/default/networks",
        {"name": "app", "kind": "overlay", "subnet": "10.30.0.0/24", "dhcp": True},
    ),
    "network create lab --isolated": ("POST", "/v1/projects/default/networks", {"name": "lab", "kind": "isolated"}),
    "image import win https://images.example/win --kind iso --sha256 " + "0" * 64: (
        "POST",
        "/v1/projects/default/images",
        {"name": "win", "kind": "iso", "format": "iso", "source": {"url": "https://images.example/win", "sha256": "0" * 64}},
    ),
    "image import iso https://images.example/a.iso --sha256 " + "0" * 64: (
        "POST",
        "/v1/projects/default/images",
        {"name": "iso", "kind": "iso", "format": "iso", "source": {"url": "https://images.example/a.iso", "sha256": "0" * 64}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", VERBS)
def test_every_long_verb_sends_its_body_with_an_idempotency_key(trimtab: Trimtab, controller: FakeController, line: str) -> None:
    method, path, body = VERBS[line]
    accept(controller, method, path)
    found = trimtab(*line.split(), "--no-wait")
    assert (found.code, found.out, found.err) == (0, "op-01\n", "")
    sent = controller.asked(method, path)[0]
    assert (sent.document if sent.body else None) == body
    assert uuid.UUID(sent.headers["idempotency-key"])


SHORT = {
    "backup policy create nightly --schedule @daily --keep-daily 7 --keep-weekly 4 --repo main --verify boot": (
        "POST",
        "/v1/projects/default/backup-policies",
        {"name": "nightly", "schedule": "@daily", "keep_daily": 7, "keep_weekly": 4, "repo": "main", "verify": "boot",
         "is_together": False, "recovers_lost": False},
    ),
    "backup policy create strict --schedule @daily --needs-filesystem --needs-application": (
        "POST",
        "/v1/projects/default/backup-policies",
        {"name": "strict", "schedule": "@daily", "needs_filesystem": True, "needs_application": True,
         "is_together": False, "recovers_lost": False},
    ),
    "host cordon node1": ("POST", "/v1/hosts/node1:cordon", None),
    "host uncordon node1": ("POST", "/v1/hosts/node1:uncordon", None),
    "host update node1 --label rack=r2 --unset-label old --rename node9 --host-class big": (
        "PATCH", "/v1/hosts/node1", {"name": "node9", "host_class": "big", "labels": {"rack": "r2", "old": None}}
    ),
    "host token revoke join-1 --yes": ("DELETE", "/v1/host-tokens/join-1", None),
    "host-class create big --vcpu-ratio 4 --memory-reserve 2GiB --cpu-model qemu64": (
        "POST",
        "/v1/host-classes",
        {"name": "big", "vcpu_ratio_permille": 4000, "memory_reserve_mib": 2048, "cpu_model": "qemu64"},
    ),
    "host-class update big --policy spread": ("PATCH", "/v1/host-classes/big", {"policy": "spread"}),
    "host-class delete big --yes": ("DELETE", "/v1/host-classes/big", None),
    "vm update web1 --label tier=db": ("PATCH", f"{VMS}/web1", {"labels": {"tier": "db"}}),
    "project create shop --vms 10 --memory 1TiB --disk unlimited": (
        "POST", "/v1/projects", {"name": "shop", "quotas": {"vms": 10, "memory_mib": 1 << 20, "disk_bytes": None}}
    ),
    "project update shop --vcpus unlimited": ("PATCH", "/v1/projects/shop", {"quotas": {"vcpus": None}}),
    "project delete shop --yes": ("DELETE", "/v1/projects/shop", None),
    "user create ann": ("POST", "/v1/users", {"name": "ann", "kind": "user"}),
    "user create ci --service": ("POST", "/v1/users", {"name": "ci", "kind": "service"}),
    "user delete ann --yes": ("DELETE", "/v1/users/ann", None),
    "user grant ann operator -p shop": ("PUT", "/v1/users/ann/roles/shop", {"role": "operator"}),
    "user grant ann admin --fleet": ("PUT", "/v1/users/ann/roles/%2A", {"role": "admin"}),
    "user revoke ann -p shop --yes": ("DELETE", "/v1/users/ann/roles/shop", None),
    "token revoke tok-1 --user ann --yes": ("DELETE", "/v1/users/ann/tokens/tok-1", None),
}  # fmt: skip


@pytest.mark.parametrize("line", SHORT)
def test_every_short_verb_sends_its_body_and_says_what_it_did(trimtab: Trimtab, controller: FakeController, line: str) -> None:
    method, path, body = SHORT[line]
    controller.on(method, path, Answer(None, status=204) if method == "DELETE" else Answer({"id": "x-1", "name": "x"}))
    found = trimtab(*line.split())
    assert (found.code, found.err) == (0, "")
    assert len(found.out.splitlines()) == 1
    sent = controller.asked(method, path)[0]
    assert (sent.document if sent.body else None) == body


def test_short_verbs_print_the_resource_for_machines(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("POST", "/v1/hosts/node1:cordon", Answer(host(is_cordoned=True)))
    assert json.loads(trimtab("host", "cordon", "node1", "-o", "json").out)["is_cordoned"] is True


def test_request_id_and_etag_are_passed_on(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("PATCH", f"{VMS}/web1", Answer(vm()))
    identifier = "0b8f5c0e-6d2f-4b42-9a3e-7f1f3c1f9a11"
    trimtab("vm", "update", "web1", "--label", "a=b", "--request-id", identifier, "--if-match", '"7"')
    sent = controller.asked("PATCH", f"{VMS}/web1")[0]
    assert sent.headers["idempotency-key"] == identifier
    assert sent.headers["if-match"] == '"7"'


def test_dry_run_asks_for_validation_only_and_waits_for_nothing(trimtab: Trimtab, controller: FakeController) -> None:
    answer = {"operation": operation("queued"), "vm": vm(), "would_be_placed_on": "node2"}
    controller.on("POST", VMS, Answer(answer, status=202))
    line = ("vm", "create", "web1", "--image", "debian", "--memory", "1GiB", "--dry-run")
    found = trimtab(*line)
    assert found.code == 0
    assert "dry run, nothing was changed" in found.out
    assert "node2" in found.out
    assert json.loads(trimtab(*line, "-o", "json").out) == answer
    assert {one.query.get("validate_only") for one in controller.seen} == {"true"}
    assert controller.asked("GET", WAIT) == []


def test_dry_run_of_a_deletion_asks_nobody(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("DELETE", f"{VMS}/web1", Answer({"operation": operation("queued", kind="vm.delete")}))
    found = trimtab("vm", "delete", "web1", "--dry-run")
    assert found.code == 0
    assert "vm.delete" in found.out


DESTRUCTIVE = [line.removesuffix(" --yes") for line in [*VERBS, *SHORT] if line.endswith(" --yes")]


@pytest.mark.parametrize("line", DESTRUCTIVE)
def test_destructive_verbs_refuse_without_yes_where_nobody_can_be_asked(
    trimtab: Trimtab, controller: FakeController, line: str
) -> None:
    found = trimtab(*line.split())
    assert found.code == 2
    assert "--yes" in found.err
    assert controller.seen == []


def test_a_failed_operation_gives_its_code_its_exit_code_and_the_next_command(
    trimtab: Trimtab, controller: FakeController
) -> None:
    error = {"kind": "no_capacity", "code": "no-host-fits", "message": "no host has room", "context": {}}
    controller.on("POST", VMS, Answer({"operation": operation("queued")}, status=202))
    controller.on("GET", WAIT, Answer(operation("failed", error=error)))
    found = trimtab("vm", "create", "web1", "--image", "debian", "--memory", "1GiB")
    assert found.code == 7
    assert found.out == ""
    assert found.err.splitlines()[-3:] == [
        "error: vm.create web1: no host has room",
        "code: no-host-fits  operation: op-01  request: req-0f1e2d",
        "next: trimtab op explain op-01",
    ]


@pytest.mark.parametrize(
    ("state", "kind", "code", "hint"),
    [
        ("failed", "quota_exceeded", 8, "trimtab op get op-01"),
        ("failed", "deadline_exceeded", 6, "trimtab op get op-01"),
        ("failed", "internal", 1, "trimtab op get op-01"),
        ("needs_attention", "unavailable", 10, "trimtab op retry op-01"),
    ],
)
def test_op_wait_ends_with_the_exit_code_of_the_outcome(
    trimtab: Trimtab, controller: FakeController, state: str, kind: str, code: int, hint: str
) -> None:
    error = {"kind": kind, "code": "some-code", "message": "it went wrong", "context": {}}
    controller.on("GET", "/v1/operations/op-01", Answer(operation("running")))
    controller.on("GET", WAIT, Answer(operation(state, error=error)))
    found = trimtab("op", "wait", "op-01", "-o", "json")
    assert found.code == code
    told = json.loads(found.err)
    assert (told["kind"], told["operation_id"], told["next"], told["exit_code"]) == (kind, "op-01", hint, code)


def test_op_wait_for_a_cancelled_operation_is_an_error(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/operations/op-01", Answer(operation("cancelled")))
    found = trimtab("op", "wait", "op-01")
    assert found.code == 1
    assert "was cancelled and undone" in found.err


def test_waiting_ends_at_its_timeout_and_the_operation_goes_on(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/operations/op-01", Answer(operation("running", step="copy")))
    controller.on("GET", WAIT, Answer(operation("running", step="copy")))
    found = trimtab("op", "wait", "op-01", "--timeout", "1s")
    assert found.code == 6
    assert "has not ended after 1s (running copy); it goes on" in found.err
    assert "next: trimtab op wait op-01" in found.err


def test_waiting_outlives_a_controller_that_restarts(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/operations/op-01", Answer(operation("running")))
    controller.on("GET", WAIT, Answer(is_dropped=True), Answer(is_dropped=True), Answer(operation("done")))
    found = trimtab("op", "wait", "op-01")
    assert found.code == 0
    assert found.out == "op-01 is done: vm.create web1\n"
    assert "still waiting for op-01" in found.err


def test_cancel_says_what_really_came_of_it(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("POST", "/v1/operations/op-01:cancel", Answer(operation("running", is_cancel_requested=True)))
    controller.on("GET", WAIT, Answer(operation("cancelled")))
    assert "cancelled, everything is undone" in trimtab("op", "cancel", "op-01").out
    controller.on("GET", WAIT, Answer(operation("done")))
    assert "past the point" in trimtab("op", "cancel", "op-01").out
    controller.on("GET", WAIT, Answer(operation("needs_attention")))
    found = trimtab("op", "cancel", "op-01")
    assert found.code == 1
    assert "trimtab op retry op-01" in found.err


def test_retry_waits_for_the_end(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("POST", "/v1/operations/op-01:retry", Answer(operation("needs_attention")))
    controller.on("GET", WAIT, Answer(operation("done")))
    found = trimtab("op", "retry", "op-01")
    assert (found.code, found.out) == (0, "op-01 is done\n")


def test_host_token_prints_the_paste_line_alone(trimtab: Trimtab, controller: FakeController) -> None:
    command = "trimtab-agent join https://c:8443 --token jt-1.s --ca-fingerprint ab"
    answer = {"id": "join-1", "token": "jt-1.s", "command": command, "expires_at": "2199-01-01T00:00:00+00:00"}
    controller.on("POST", "/v1/host-tokens", Answer(answer, status=201))
    found = trimtab("host", "token", "create", "node4")
    assert found.out == command + "\n"
    assert "expires in" in found.err
    trimtab("host", "token", "create", "node4", "--rejoin")
    assert [one.document for one in controller.seen] == [{"name": "node4"}, {"name": "node4", "rejoin": True}]


def test_token_create_prints_the_secret_alone(trimtab: Trimtab, controller: FakeController) -> None:
    token = {"id": "tok-1", "name": "ci", "expires_at": "2199-01-01T00:00:00+00:00"}
    controller.on("GET", "/v1/whoami", Answer({"name": "ann", "user": {"name": "ann"}}))
    controller.on("POST", "/v1/users/ann/tokens", Answer({"token": token, "secret": "tt-1.s"}, status=201))
    found = trimtab("token", "create", "--name", "ci", "--expires", "30d")
    assert found.out == "tt-1.s\n"
    assert controller.asked("POST", "/v1/users/ann/tokens")[0].document == {"name": "ci", "expires_in_days": 30}


def test_host_remove_may_keep_its_guests_and_do_without_the_host(trimtab: Trimtab, controller: FakeController) -> None:
    accept(controller, "DELETE", "/v1/hosts/node1", kind="host.remove")
    found = trimtab("host", "remove", "node1", "--keep-guests", "--yes")
    assert (found.code, found.out) == (0, "host node1 is no longer in the fleet\n")
    assert trimtab("host", "remove", "node1", "--force", "--yes").code == 0
    asked = [one.query for one in controller.asked("DELETE", "/v1/hosts/node1")]
    assert asked == [{"keep_guests": "true"}, {"force": "true"}]


def test_that_a_host_is_down_has_an_exit_code_of_its_own(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("POST", f"{VMS}/web1:migrate", problem(409, "host-not-up", "no_capacity", "node2: it is lost, not up"))
    assert trimtab("vm", "migrate", "web1", "--to", "node2").code == 10


def test_no_capacity_on_start_points_at_the_reasons(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("POST", f"{VMS}/web1:start", problem(409, "no-host-fits", "no_capacity", "no host has room"))
    found = trimtab("vm", "start", "web1")
    assert found.code == 7
    assert "next: trimtab vm explain web1" in found.err


def test_filters_of_an_operation_list_are_merged(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/projects/default/operations", page(operation()))
    assert trimtab("op", "list", "--live", "--filter", "kind=vm.create").code == 0
    assert controller.seen[0].query["filter"] == "done=false,kind=vm.create"


def test_explanations_go_to_machines_as_they_are(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", f"{VMS}/web1:explain", Answer(decision()))
    assert json.loads(trimtab("vm", "explain", "web1", "-o", "json").out) == decision()
    assert trimtab("vm", "explain", "web1", "-o", "name").out == "node2\n"

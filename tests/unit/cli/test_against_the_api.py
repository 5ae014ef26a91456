"""The command against the real API over TLS: what one asks for is what the other offers. Nobody drives operations here."""

import asyncio
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn

from tests.api.kit import Api, running_api
from tests.unit.cli.conftest import Program, Trimtab

START_TIMEOUT_S = 60.0
CREATE = ("vm", "create", "web1", "--image", "debian", "--memory", "1GiB", "--no-wait")


class Served:
    """The application behind uvicorn in a thread of its own."""

    def __init__(self, database_url: str, directory: Path, certificate: Path) -> None:
        self.api: Api | None = None
        self.port = 0
        self.loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        self._place = (database_url, directory, certificate)
        self._is_up = threading.Event()
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=lambda: self.loop.run_until_complete(self._serve()), daemon=True)
        self._thread.start()
        assert self._is_up.wait(START_TIMEOUT_S)

    async def _serve(self) -> None:
        database_url, directory, certificate = self._place
        async with running_api(database_url, directory) as self.api:
            await self.api.equip()
            config = uvicorn.Config(
                self.api.app,
                host="127.0.0.1",
                port=0,
                ssl_certfile=certificate,
                ssl_keyfile=certificate,
                lifespan="off",
                log_level="warning",
                timeout_graceful_shutdown=1,
            )
            self._server = uvicorn.Server(config)
            serving = asyncio.create_task(self._server.serve())
            while not self._server.started:
                await asyncio.sleep(0.01)
            self.port = self._server.servers[0].sockets[0].getsockname()[1]
            self._is_up.set()
            await serving

    def close(self) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(timeout=START_TIMEOUT_S)
        self.loop.close()


@pytest.fixture
def served(
    sqlite_url: str, tmp_path: Path, certificate: Path, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    running = Served(sqlite_url, tmp_path, certificate)
    assert running.api is not None
    monkeypatch.setenv("TRIMTAB_URL", f"https://127.0.0.1:{running.port}")
    monkeypatch.setenv("TRIMTAB_TOKEN", running.api.secrets["admin"])
    monkeypatch.setenv("TRIMTAB_PROJECT", "p1")
    yield running
    running.close()


READS = [
    "secgroup list", "router list", "floating list",
    "host list", "host get node1", "host token list", "host-class list", "host-class get default", "pool list", "pool get local",
    "network list", "network list --shared", "network get default", "image list", "image get debian", "volume list",
    "vm list", "vm get web1", "vm list --deleted -l tier=web --filter state=unknown --sort-by -created_at --limit 5",
    "op list", "op list --live", "op list -A", "event list", "event list -A --after 0 --kind vm.", "event list --subject web1",
    "project list", "project get p1", "user list", "user get admin", "token list", "whoami", "version",
    "audit list --actor admin --since 2h", "plan list", "plan list --filter state=open", "capacity get", "capacity get --by zone",
    "failover check", "failover check --by host --by rack", "failover list", "failover list --filter state=lost", "failover status",
    "backup instant list", "recovery plan list",
    "fence list", "fence get node1", "drill host-loss node1", "drill host-loss node1 --boot-time 20s",
]  # fmt: skip


def test_everything_can_be_read_in_every_form(served: Served, trimtab: Trimtab) -> None:
    made = trimtab(*CREATE, "--network", "default", "--label", "tier=web")
    assert (made.code, made.err) == (0, "")
    failed = {}
    for line in READS:
        for output in ("table", "wide", "json", "yaml", "name"):
            found = trimtab(*line.split(), "-o", output)
            if found.code != 0 or (output == "json" and json.loads(found.out) is None):
                failed[f"{line} -o {output}"] = found.err
    assert failed == {}
    operation = trimtab("op", "list", "-o", "name").out.strip()
    assert "vm.create" in trimtab("op", "get", operation).out
    assert trimtab("op", "explain", operation).code == 0


CHANGES = [
    "plan create rebalance", "plan create consolidate --max-moves 5 --dry-run", "plan create drain node1 --deadline 2h",
    "plan create upgrade", "plan create evacuate -l rack=r1 node1", "host drain node1 --plan", "host drain node1 --no-wait",
    "host maintenance start node2 --no-wait", "host maintenance end node2",
    "host cordon node1", "host uncordon node1", "host update node1 --label rack=r2 --host-class default",
    "host token create node9", "host-class create big --vcpu-ratio 4 --memory-reserve 2GiB --cpu-model qemu64 --policy best-fit",
    "host-class update big --memory-ratio 1.5", "host-class delete big --yes",
    "vm create web1 --image debian --vcpus 2 --vcpus-max 4 --memory 96MiB --memory-max 1GiB --disk 2GiB --pool local "
    "--network default,mac=52:54:00:12:34:56 --firmware uefi --arch x86_64 --host-class default --select rack=r2 "
    "--label tier=web --hostname web --no-start --no-wait",
    "vm update web1 --label tier=db --unset-label old", "vm update web1 --drain-policy wait",
    "vm create web2 --image debian --memory 1GiB --dry-run",
    "project create shop --vms 10 --memory 1TiB --disk unlimited --snapshots 5 --floating 2", "project update shop --vcpus 8 --vms unlimited",
    "project delete shop --yes",
    "user create ann", "user create ci --service", "user grant ann operator", "user grant ann viewer --fleet",
    "user revoke ann --fleet --yes", "token create --user ann --name ci --expires 30d", "user delete ann --yes",
    "secgroup create web --allow tcp/443 --allow tcp/22@10.0.0.0/8", "secgroup create none --closed",
    "vm update web1 --secgroup web --no-wait", "secgroup update web --allow icmp --no-wait",
    "vm update web1 --no-secgroups --no-wait", "secgroup delete web --yes",
    "vm create router --image debian --memory 1GiB --pool local --network default,allow-spoofing --secgroup none --no-wait",
    "network create lab1 --isolated --subnet 10.31.0.0/24 --dhcp --mtu 9000 --no-wait",
    "host check --all --no-wait", "host check node1 --dry-run",
    "network create front --bridge br0 --bridge-on node1=br1 --vlan 7 --mtu 9000 --no-wait",
    "network create lab --nat --subnet 10.30.0.0/24 --dhcp --shared --no-wait",
    "network create lan --bridge br0 --subnet 192.0.2.0/24 --gateway 192.0.2.1 --dns 192.0.2.53 --dns 2001:db8::53 --no-wait",
    "network get lan -o wide",
    "pool create fast --path /srv/fast --shared --no-wait",
    "volume create disk1 --size 1GiB --pool local --format raw --no-wait",
    "image import remote https://images.example.org/a.qcow2 --pool local --no-wait --sha256 " + "0" * 64,
    "image import onhost disk.raw --on-host node1 --pool local --no-wait",
    "failover pause", "failover resume", "failover release node1 --reason fire --yes",
    "fence config node1 --agent fence_redfish --address 192.0.2.31 --user root --option ssl_insecure=1",
    "fence config node1 --agent fence_apc --name pdu --address 192.0.2.9 --port 23 --plug 7 --order 1",
    "fence test node1 --dry-run", "fence test --all --dry-run", "fence remove node1 pdu --yes",
    "vm create db --image debian --memory 1GiB --pool local --ha restart --priority 10 --start-delay 30s --no-wait",
    "vm create shop1 --image debian --memory 1GiB --pool local --ha restart --start-group shop --start-order 2 --start-delay 20s "
    "--no-wait",
    "vm get shop1 -o wide",
    "host reboot node1 --force --yes --dry-run",
    "host remove node2 --keep-guests --yes --no-wait", "host remove node1 --force --keep-guests --yes --no-wait",
]  # fmt: skip


def test_what_becomes_of_a_vm_without_its_host_changes_by_itself(served: Served, trimtab: Trimtab) -> None:
    assert trimtab(*CREATE).code == 0
    together = trimtab("vm", "update", "web1", "--ha", "restart", "--label", "tier=web")
    assert (together.code, "by itself" in together.err) == (2, True), together
    busy = trimtab("vm", "update", "web1", "--ha", "restart", "--priority", "10", "--start-delay", "30s", "--no-wait")
    assert (busy.code, "vm.create" in busy.err) == (5, True), busy


def test_the_place_in_a_start_group_is_shown_changed_and_given_up(served: Served, trimtab: Trimtab) -> None:
    assert trimtab(*CREATE, "--start-group", "shop", "--start-order", "2").code == 0
    shown = " ".join(trimtab("vm", "get", "web1").out.split())
    assert "start group shop, order 2" in shown
    both = trimtab("vm", "update", "web1", "--no-start-group", "--start-order", "3")
    assert (both.code, "--no-start-group" in both.err) == (2, True), both
    beyond = trimtab("vm", "update", "web1", "--start-group", "shop", "--start-order", "1001")
    assert (beyond.code, "0<=x<=1000" in beyond.err) == (2, True), beyond
    operation = trimtab("op", "list", "-o", "name").out.strip()
    assert served.api is not None
    asyncio.run_coroutine_threadsafe(served.api.end_operations(), served.loop).result(START_TIMEOUT_S)
    assert trimtab("vm", "update", "web1", "--no-start-group", "--no-wait").code == 0, operation
    assert "start group" not in trimtab("vm", "get", "web1").out


def test_every_change_is_understood(served: Served, trimtab: Trimtab) -> None:
    failed = {}
    for line in CHANGES:
        found = trimtab(*line.split())
        if found.code != 0:
            failed[line] = found.err
    assert failed == {}


OVERLAY_CHANGES = [
    "network create lan --bridge br0 --outer --subnet 192.0.2.0/24 --gateway 192.0.2.1 --range 192.0.2.100-192.0.2.109 --no-wait",
    "network create lab1 --overlay --subnet 10.31.0.0/24 --no-wait",
    "network create lab6 --overlay --subnet 10.36.0.0/24 --subnet6 fd00:36::/64 --ipv6 dhcp --no-wait", "network get lab6 -o wide",
    "vm create web1 --image debian --memory 1GiB --pool local --network lab1 --no-wait",
    "router create edge --outer lan --outer-address 192.0.2.105/24 --dry-run",
    "router create edge --network lab1 --outer lan --outer-address 192.0.2.105/24",
    "router update edge --no-outer", "router update edge --outer lan", "router get edge -o wide",
    "floating create --network lan --address 192.0.2.101", "floating create --network lan --dry-run",
    "floating attach 192.0.2.101 --vm web1/0", "floating get 192.0.2.101", "floating list -o wide",
    "floating detach 192.0.2.101", "floating delete 192.0.2.101 --yes",
    "router detach edge --network lab1", "router attach edge --network lab1", "router detach edge --network lab1",
    "router delete edge --yes", "network get lan -o wide",
]  # fmt: skip


def test_every_change_of_what_is_around_overlay_networks_is_understood(served: Served, trimtab: Trimtab) -> None:
    assert served.api is not None
    runtime = served.api.app.state.runtime
    runtime.context = replace(runtime.context, settings=replace(runtime.context.settings, has_overlay=True))
    failed = {line: found.err for line in OVERLAY_CHANGES if (found := trimtab(*line.split())).code != 0}
    assert failed == {}
    made = trimtab("floating", "create", "--network", "lan")
    assert made.out == "floating address 192.0.2.100 of network lan is yours\n"
    for line in (
        "router create edge --outer-address 192.0.2.105", "router update edge", "router update edge --outer lan --no-outer",
        "network create x --bridge br0 --outer --subnet 198.51.100.0/24", "network create x --bridge br0 --gateway 192.0.2.1",
    ):  # fmt: skip
        assert trimtab(*line.split()).code == 2, line
    trimtab("router", "create", "edge", "--network", "lab1", "--outer", "lan")
    assert "leads to vm web1" in trimtab("floating", "attach", "192.0.2.100", "--vm", "web1").out
    held = [line.split() for line in trimtab("router", "get", "edge").out.splitlines()]
    assert ["192.0.2.101", "lan", "router", "edge"] in held
    assert ["192.0.2.100", "lan", "vm", "web1", "(10.31.0.2)"] in held
    vm = [line.split() for line in trimtab("vm", "get", "web1").out.splitlines()]
    assert ["floating", "192.0.2.100"] in [line[-2:] for line in vm]
    assert any(line[:3] == ["0", "lab1", "overlay"] and "192.0.2.100" in line for line in vm)


def test_a_dry_run_shows_where_a_vm_would_go_and_why(served: Served, trimtab: Trimtab) -> None:
    found = trimtab("vm", "create", "web1", "--image", "debian", "--memory", "1GiB", "--dry-run")
    assert found.code == 0
    assert "placed on node1" in found.out
    assert "2 of 2 hosts fit" in found.out


def test_a_dry_run_that_fits_nowhere_ends_with_its_own_exit_code_and_each_hosts_reason(served: Served, trimtab: Trimtab) -> None:
    found = trimtab("vm", "create", "web1", "--image", "debian", "--memory", "512GiB", "--dry-run")
    assert found.code == 7
    assert "node1: " in found.err
    assert "node2: " in found.err
    assert "MiB" in found.err


def test_a_file_is_uploaded_and_a_refusal_comes_before_the_bytes(
    served: Served, trimtab: Trimtab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"QFI\xfb" + bytes(3 << 20)
    source = tmp_path / "guest.qcow2"
    source.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    found = trimtab("image", "import", "micro", str(source), "--sha256", digest, "--no-wait")
    assert found.code == 0
    assert found.out.startswith("op-")
    refused = trimtab("image", "import", "other", str(source), "--sha256", "0" * 64)
    assert refused.code == 2
    assert trimtab("image", "import", "micro", str(source)).code == 5
    assert served.api is not None
    monkeypatch.setenv("TRIMTAB_TOKEN", served.api.secrets["p1-viewer"])
    denied = trimtab("image", "import", "third", str(source))
    assert (denied.code, "sending" in denied.err) == (9, False)


def test_refusals_keep_their_meaning(served: Served, trimtab: Trimtab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trimtab("vm", "get", "absent").code == 4
    assert trimtab("vm", "create", "web1", "--image", "absent", "--memory", "1GiB").code == 4
    assert trimtab(*CREATE).code == 0
    assert trimtab(*CREATE).code == 5
    stale = trimtab("vm", "update", "web1", "--label", "a=b", "--if-match", '"99"')
    assert (stale.code, "stale-etag" in stale.err) == (5, True)
    wrong = trimtab("vm", "create", "WEB", "--image", "debian", "--memory", "1GiB")
    assert (wrong.code, "name" in wrong.err) == (2, True)
    assert served.api is not None
    monkeypatch.setenv("TRIMTAB_TOKEN", served.api.secrets["p1-viewer"])
    assert trimtab("vm", "delete", "web1", "--yes").code == 9
    monkeypatch.setenv("TRIMTAB_TOKEN", "tt-unknown.secret")
    assert trimtab("vm", "list").code == 9


def test_a_token_whose_time_is_over_is_refused_as_that_with_what_to_do(
    served: Served, trimtab: Trimtab, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served.api is not None
    assert trimtab("user", "create", "ci", "--service").code == 0
    made = trimtab("token", "create", "--user", "ci", "--name", "night", "--expires", "1d", "-o", "json")
    assert made.code == 0, made.err
    monkeypatch.setenv("TRIMTAB_TOKEN", json.loads(made.out)["secret"])
    assert trimtab("whoami").code == 0
    served.api.clock.turn(days=2)
    refused = trimtab("whoami")
    assert (refused.code, "token-expired" in refused.err, "trimtab login" in refused.err) == (9, True, True), refused.err


def test_a_plan_is_shown_before_anything_is_changed_and_deleted(served: Served, trimtab: Trimtab) -> None:
    shown = trimtab("plan", "create", "drain", "node1")
    assert shown.code == 0
    assert "cordon" in shown.out
    identifier = trimtab("plan", "list", "-o", "name").out.strip()
    assert identifier.startswith("plan-")
    assert "cordon" in trimtab("plan", "get", identifier).out
    assert trimtab("plan", "apply", identifier, "--no-wait").out.startswith("op-")
    assert trimtab("plan", "delete", identifier, "--yes").code == 5
    assert trimtab("plan", "cancel", identifier).code == 0
    fit = trimtab("capacity", "fit", "--vcpus", "4", "--memory", "16GiB", "--without", "node2")
    assert (fit.code, "0 more vms of 4 vcpus and 16 GiB fit" in fit.out) == (7, True)


def test_the_doctor_tells_notices_quietly_and_warnings_with_an_exit_code(
    served: Served, trimtab: Trimtab, sqlite_url: str
) -> None:
    assert trimtab("host", "cordon", "node1").code == 0
    for output in ("table", "wide", "json", "yaml", "name"):
        found = trimtab("doctor", "-o", output)
        assert (found.code, found.err) == (0, ""), output
        assert "host node1" in found.out
    assert "trimtab host uncordon node1" in trimtab("doctor").out
    with sqlite3.connect(sqlite_url.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE host SET connectivity = 'lost' WHERE name = 'node1'")
    lost = trimtab("doctor", "-o", "json")
    assert (lost.code, json.loads(lost.out)["findings"][0]["kind"]) == (3, "host-lost")


def test_a_repeat_with_the_same_request_id_is_done_once(served: Served, trimtab: Trimtab) -> None:
    line = (*CREATE, "--request-id", "0b8f5c0e-6d2f-4b42-9a3e-7f1f3c1f9a11")
    assert trimtab(*line).out == trimtab(*line).out != ""


def test_a_wait_ends_with_the_operation(served: Served, trimtab: Trimtab) -> None:
    started = trimtab(*CREATE).out.strip()
    assert trimtab("op", "wait", started, "--timeout", "1s").code == 6
    cancelled = trimtab("op", "cancel", started, "--no-wait")
    assert cancelled.code == 0
    assert started in cancelled.out


def test_watches_show_what_comes(served: Served, trimtab: Trimtab, program: Program) -> None:
    assert served.api is not None
    running = Program({**program.environment, "TRIMTAB_URL": f"https://127.0.0.1:{served.port}"})
    vms = running.start("vm", "list", "--watch", "-o", "name")
    events = running.start("event", "list", "--watch", "--after", "0", "--kind", "operation.", "-o", "json")
    try:
        assert trimtab(*CREATE).code == 0
        assert vms.stdout is not None
        assert vms.stdout.readline() == "web1\n"
        assert events.stdout is not None
        assert json.loads(events.stdout.readline())["subject"]["name"] == "web1"
    finally:
        for process in (vms, events):
            process.terminate()
            process.communicate(timeout=20)


def test_groups_exclusive_hosts_admission_and_the_journal_are_the_apis_own(served: Served, trimtab: Trimtab) -> None:
    made = trimtab("vm-group", "create", "db", "--apart", "host=2", "--prefer-apart", "rack", "--prefer-together", "zone")
    assert (made.code, made.out) == (0, "vm group db created\n")
    listed = trimtab("vm-group", "list", "-o", "json")
    assert [rule["summary"] for rule in json.loads(listed.out)[0]["rules"]] == [
        "must anti-affinity by host (at most 2 each)",
        "should anti-affinity by rack",
        "should affinity by zone",
    ]
    assert trimtab("vm-group", "update", "db", "--apart", "host").code == 0
    assert trimtab(*CREATE, "--group", "db").code == 0
    assert "web1" in trimtab("vm-group", "get", "db").out
    assert trimtab("vm-group", "delete", "db", "--yes").code == 5
    assert trimtab("host", "update", "node2", "--exclusive", "p2").code == 0
    assert json.loads(trimtab("host", "get", "node2", "-o", "json").out)["exclusive_project"] == "p2"
    assert trimtab("host", "update", "node2", "--exclusive", "none").code == 0
    assert trimtab("host-class", "update", "default", "--admission", "one-host-loss").code == 0
    assert json.loads(trimtab("host-class", "get", "default", "-o", "json").out)["admission"] == "one-host-loss"
    replayed = trimtab("placement", "replay", "--journal", "--since", "7d", "--policy", "spread", "-o", "json")
    assert json.loads(replayed.out)["decisions"] == 0, replayed.err
    assert trimtab("placement", "replay", "--journal").code == 2


def test_a_vm_that_fits_nowhere_is_told_the_smallest_change_that_would_fit(served: Served, trimtab: Trimtab) -> None:
    refused = trimtab("vm", "create", "big", "--image", "debian", "--memory", "64GiB", "--dry-run")
    assert refused.code == 7
    assert "it would fit on node1 with " in refused.err
    pinned = trimtab(
        "vm", "create", "db", "--image", "debian", "--memory", "1GiB", "--dedicated", "--hugepages", "2MiB", "--dry-run"
    )
    assert pinned.code == 7
    assert "its agent cannot do numa-tuning" in pinned.err or "no cpus are set aside for pinning" in pinned.err
    device = trimtab("vm", "create", "gpu", "--image", "debian", "--memory", "1GiB", "--device", "10de-20b0=2", "--dry-run")
    assert device.code == 7
    assert trimtab("vm", "create", "gpu", "--image", "debian", "--memory", "1GiB", "--device", "a100=x", "--dry-run").code == 2

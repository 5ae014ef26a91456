"""A Ceph cluster of one monitor, one manager and one disk, in ctl: what RBD pools are tested against.

Its disk is BlueStore on a sparse file, so that nothing of the kernel is needed; one copy of everything, so it proves nothing about
Ceph's own safety. Processes end with the lab, and what they hold goes with its state.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab_lab.commands import run, wait_until
from trimtab_lab.ctl import ctl_command, running_process_id, start_in_ctl
from trimtab_lab.errors import LabError
from trimtab_lab.specs import LabSpec

MONITOR_PORT = 6789
POOL, USER = "vms", "trimtab"
DISK_BYTES = 2 << 30
_READY_S = 90.0
_CONFIGURATION = """[global]
fsid = {fsid}
mon_host = v1:{address}:{port}
mon_initial_members = a
public_addr = {address}
ms_bind_msgr2 = false
mon_data = {directory}/mon
osd_data = {directory}/osd
mgr_data = {directory}/mgr
keyring = {directory}/admin.keyring
log_file = /dev/null
log_to_stderr = true
err_to_stderr = true
admin_socket = {directory}/$name.asok
run_dir = {directory}
crash_dir = {directory}
# One disk, one copy.
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
auth_allow_insecure_global_id_reclaim = false
osd_pool_default_pg_autoscale_mode = off
osd_pool_default_pg_num = 8
# A disk of the machine that is nearly full stops the monitor otherwise.
mon_data_avail_crit = 1
bluestore_block_size = {disk_bytes}
osd_memory_target = 939524096
bluestore_cache_size = 67108864
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    monitor: str
    key: str
    """Of the user `USER`, who may use the pool `POOL`."""
    configuration: Path
    """With the administrator's key: `ceph --conf` and `rbd --conf` on the machine, run by `Lab.in_ctl`."""


def start(lab: LabSpec) -> Cluster:
    """Make the cluster, or start it again, and wait until its pool takes writes and its space is counted."""
    if not Path("/usr/bin/ceph-mon").exists():
        raise LabError("Ceph is not installed; `ops/bootstrap.sh` brings it")
    directory = lab.state_directory / "ceph"
    cluster = directory / "ceph.conf"
    is_new = not cluster.exists()
    if is_new:
        _make_monitor(lab, directory)
    _start(lab, "ceph-mon", ["-i", "a"])
    if is_new:
        _make_disk(lab, directory)
    keys = {"osd": directory / "osd/keyring", "mgr": directory / "mgr/keyring"}
    _start(lab, "ceph-mgr", ["-i", "x", "--keyring", str(keys["mgr"])])
    _start(lab, "ceph-osd", ["-i", "0", "--keyring", str(keys["osd"])])
    if is_new:
        ask(lab, ["ceph", "osd", "pool", "create", POOL])
        ask(lab, ["ceph", "osd", "pool", "application", "enable", POOL, "rbd"])
    if not wait_until(lambda: _is_counted(lab), timeout_s=_READY_S, interval_s=0.5):
        raise LabError(f"the cluster is not up after {_READY_S:.0f} s; see {lab.log_directory}")
    key = ask(lab, ["ceph", "auth", "get-key", f"client.{USER}"]).strip()
    return Cluster(f"{lab.ctl_address}:{MONITOR_PORT}", key, cluster)


def ask(lab: LabSpec, command: Sequence[str]) -> str:
    """Run one of Ceph's commands as its administrator; return what it prints."""
    program, *words = command
    conf = lab.state_directory / "ceph/ceph.conf"
    return run(ctl_command(lab, [program, "--conf", str(conf), *words]), timeout_s=60).stdout


def _make_monitor(lab: LabSpec, directory: Path) -> None:
    for name in ("mon", "osd", "mgr"):
        (directory / name).mkdir(parents=True)
    address, fsid = lab.ctl_address, str(uuid.uuid4())
    admin, map_file = directory / "admin.keyring", directory / "monmap"
    monitor, everything = (
        directory / "mon.keyring",
        ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"],
    )
    run(["ceph-authtool", "--create-keyring", str(admin), "--gen-key", "-n", "client.admin", *everything])
    run(["ceph-authtool", "--create-keyring", str(monitor), "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"])
    run(["ceph-authtool", str(monitor), "--import-keyring", str(admin)])
    run(["monmaptool", "--create", "--addv", "a", f"[v1:{address}:{MONITOR_PORT}]", "--fsid", fsid, str(map_file)])
    settings = {"fsid": fsid, "address": address, "port": MONITOR_PORT, "directory": directory, "disk_bytes": DISK_BYTES}
    (directory / "ceph.conf.new").write_text(_CONFIGURATION.format(**settings))
    make = ["ceph-mon", "--conf", str(directory / "ceph.conf.new"), "--mkfs", "-i", "a", "--monmap", str(map_file)]
    run(ctl_command(lab, [*make, "--keyring", str(monitor)]), timeout_s=60)
    (directory / "ceph.conf.new").rename(directory / "ceph.conf")


def _make_disk(lab: LabSpec, directory: Path) -> None:
    """Make the one disk, the manager's key and the user's, all at a monitor that runs already."""
    disk_id, key = str(uuid.uuid4()), run(["ceph-authtool", "--gen-print-key"]).stdout.strip()
    (secret := directory / "osd/secret.json").write_text(json.dumps({"cephx_secret": key}))
    keyring = directory / "osd/keyring"
    run(["ceph-authtool", "--create-keyring", str(keyring), "--name", "osd.0", "--add-key", key])
    ask(lab, ["ceph", "osd", "new", disk_id, "-i", str(secret)])
    make = ["ceph-osd", "--conf", str(directory / "ceph.conf"), "-i", "0", "--mkfs", "--osd-uuid", disk_id]
    run(ctl_command(lab, [*make, "--keyring", str(keyring)]), timeout_s=60)
    manager = ["mon", "allow profile mgr", "osd", "allow *", "mds", "allow *"]
    (directory / "mgr/keyring").write_text(ask(lab, ["ceph", "auth", "get-or-create", "mgr.x", *manager]))
    rights = ["mon", "profile rbd", "osd", f"profile rbd pool={POOL}", "mgr", f"profile rbd pool={POOL}"]
    ask(lab, ["ceph", "auth", "get-or-create", f"client.{USER}", *rights])


def _start(lab: LabSpec, program: str, words: Sequence[str]) -> None:
    if running_process_id(lab, program) is None:
        conf = lab.state_directory / "ceph/ceph.conf"
        start_in_ctl(lab, [program, "--conf", str(conf), "-f", *words], log_name=program)


def _is_counted(lab: LabSpec) -> bool:
    """Tell whether the disk is in and the manager counts the pool's room."""
    found = json.loads(ask(lab, ["ceph", "df", "--format", "json"]))
    return any(pool["name"] == POOL and pool["stats"]["max_avail"] > 0 for pool in found["pools"])


def fill(lab: LabSpec, image: str, raw: Path) -> None:
    """Write a raw disk into an image of the pool, which is there and of its size."""
    conf = lab.state_directory / "ceph/ceph.conf"
    copy = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(raw), f"rbd:{POOL}/{image}:conf={conf}"]
    run(ctl_command(lab, copy), timeout_s=120)

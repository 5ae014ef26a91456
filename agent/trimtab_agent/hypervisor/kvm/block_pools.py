"""Pools whose volumes are no files: LUNs of an iSCSI target, logical volumes of an LVM thin pool, images of a Ceph pool.

QEMU opens what is in the network itself, so nothing hangs in this host's kernel. Passwords and keys go to `qemu-img` and QEMU through
their secret objects only. Commands are lists of words that were checked by pattern; nothing that somebody typed becomes an option.
Such a pool holds volumes and nothing else: images, seeds and UEFI variables need a directory.
"""

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar
from xml.etree.ElementTree import Element, SubElement

from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.lent_secrets import in_memory
from trimtab_protos.errors import Conflict, InvalidRequest, NoCapacity, NotFound, TrimtabError, Unavailable
from trimtab_protos.messages import DiskFormat, DiskSpec, PoolKind, PoolObservation, PoolSpec, VolumeObservation, VolumeSpec
from trimtab_protos.pool_messages import IscsiSource, LvmSource, RbdSource

T = TypeVar("T")

BLOCK_KINDS = (PoolKind.ISCSI, PoolKind.LVM_THIN, PoolKind.RBD)
CONNECT_TIMEOUT_S = 1.5
COMMAND_TIMEOUT_S = 20.0
PORT_ISCSI, PORT_MONITOR = 3260, 6789
MAX_LUN = 255

_PORTAL = re.compile(r"(?:(?P<name>[A-Za-z0-9][A-Za-z0-9.-]{0,252})|\[(?P<v6>[0-9A-Fa-f:]{2,45})\])(?::(?P<port>[0-9]{1,5}))?")
_TARGET = re.compile(r"(?:iqn\.[0-9]{4}-[0-9]{2}\.|eui\.|naa\.)[A-Za-z0-9.:-]{1,200}")
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
_LVM_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_+.-]{0,126}")
_VOLUME_ID_PREFIX = "vol-"  # of every id that a controller gives a volume
SECRET_ID = "pool-secret"  # noqa: S105 - the name of an object
Run = Callable[[Sequence[str], "bytes | None"], "tuple[int, str, str]"]
"""Runs a command, whose arguments may name the secret's file as `SECRET_FILE`; returns (exit code, standard output, complaint)."""
SECRET_FILE = "{secret}"  # noqa: S105 - replaced by the path of a descriptor


@dataclass(frozen=True, slots=True)
class Portal:
    host: str
    port: int


def is_block(pool: PoolSpec) -> bool:
    return pool.kind in BLOCK_KINDS


def check(pool: PoolSpec) -> None:
    """Raise InvalidRequest where the pool says nothing usable of what lies behind it; the field is named."""
    check_id(pool.pool_id, "pool_id")
    match pool.kind:
        case PoolKind.ISCSI:
            source = _iscsi(pool)
            parse_portal(source.portal, PORT_ISCSI, field="iscsi.portal")
            _words(_TARGET, source.target, "iscsi.target", "iqn.2026-01.example:san")
            if source.chap_user:
                _words(_USER, source.chap_user, "iscsi.chap_user", "fleet")
        case PoolKind.LVM_THIN:
            lvm = _lvm(pool)
            _words(_LVM_NAME, lvm.volume_group, "lvm.volume_group", "vg0")
            _words(_LVM_NAME, lvm.thin_pool, "lvm.thin_pool", "thin")
        case PoolKind.RBD:
            rbd = _rbd(pool)
            for monitor in rbd.monitors:
                parse_portal(monitor, PORT_MONITOR, field="rbd.monitors")
            _words(_USER, rbd.pool, "rbd.pool", "vms")
            _words(_USER, rbd.user, "rbd.user", "trimtab")
        case _:
            raise InvalidRequest("pool-kind-unknown", f"a pool of kind {pool.kind} is a directory", field="kind")


def needs_secret(pool: PoolSpec) -> bool:
    """Tell whether its storage lets nobody in without a secret."""
    return (pool.kind is PoolKind.ISCSI and bool(_iscsi(pool).chap_user)) or pool.kind is PoolKind.RBD


def parse_portal(text: str, port: int, *, field: str) -> Portal:
    found = _PORTAL.fullmatch(text)
    if found is None or not 0 < int(found["port"] or port) < 1 << 16:
        raise InvalidRequest("portal-wrong", f"{field}: {text[:100]!r} must be an address such as 10.0.0.5:{port}", field=field)
    return Portal(found["name"] or found["v6"], int(found["port"] or port))


def lun_of(volume_id: str, unit: str) -> int:
    if not unit.isascii() or not unit.isdigit() or int(unit) > MAX_LUN:
        raise InvalidRequest("lun-wrong", f"volume {volume_id} needs its LUN, 0 to {MAX_LUN}", field="unit")
    return int(unit)


# --- definitions -----------------------------------------------------------------------------------------------------------


def describe_source(element: Element, disk: DiskSpec, pool: PoolSpec, secret_uuid: str) -> None:
    """Write a disk's type and source into its element. `secret_uuid`: under which libvirt will know the pool's secret."""
    check(pool)
    check_id(disk.volume_id, "volume_id")
    match pool.kind:
        case PoolKind.ISCSI:
            iscsi = _iscsi(pool)
            element.set("type", "network")
            name = f"{iscsi.target}/{lun_of(disk.volume_id, disk.unit)}"
            source = SubElement(element, "source", protocol="iscsi", name=name)
            _host(source, parse_portal(iscsi.portal, PORT_ISCSI, field="iscsi.portal"))
            if iscsi.chap_user:
                _auth(source, iscsi.chap_user, "iscsi", secret_uuid)
        case PoolKind.LVM_THIN:
            element.set("type", "block")
            SubElement(element, "source", dev=device_path(_lvm(pool), disk.volume_id))
        case _:
            rbd = _rbd(pool)
            element.set("type", "network")
            source = SubElement(element, "source", protocol="rbd", name=f"{rbd.pool}/{disk.volume_id}")
            for monitor in rbd.monitors:
                _host(source, parse_portal(monitor, PORT_MONITOR, field="rbd.monitors"))
            _auth(source, rbd.user, "ceph", secret_uuid)


def device_path(lvm: LvmSource, volume_id: str) -> str:
    return f"/dev/{lvm.volume_group}/{volume_id}"


def _host(source: Element, portal: Portal) -> None:
    SubElement(source, "host", name=portal.host, port=str(portal.port))


def _auth(source: Element, user: str, usage: str, secret_uuid: str) -> None:
    auth = SubElement(source, "auth", username=user)
    SubElement(auth, "secret", type=usage, uuid=secret_uuid)


# --- the pool --------------------------------------------------------------------------------------------------------------


def observe(pool: PoolSpec, secret: bytes | None = None, run: Run | None = None) -> PoolObservation:
    """Return what can be seen of the pool now. An open port says that what is in the network is there.

    The space of LUNs is their own (capacity 0); that of a Ceph pool is seen only while its key is here.
    """
    now_ms = time.time_ns() // 1_000_000
    seen = PoolObservation(pool_id=pool.pool_id, observed_at_ms=now_ms)
    try:
        check(pool)
        if pool.kind is PoolKind.LVM_THIN:
            return _observe_thin(pool, run or run_command, now_ms)
        _knock(_portals(pool))
        if pool.kind is PoolKind.RBD and secret is not None:
            return observe_ceph(pool, secret, run or run_command, now_ms)
    except TrimtabError as error:
        problem, is_hung = error.message, isinstance(error, Unavailable)
        return PoolObservation(pool_id=pool.pool_id, is_responsive=False, is_hung=is_hung, problem=problem, observed_at_ms=now_ms)
    return seen


def _portals(pool: PoolSpec) -> tuple[Portal, ...]:
    if pool.kind is PoolKind.ISCSI:
        return (parse_portal(_iscsi(pool).portal, PORT_ISCSI, field="iscsi.portal"),)
    return tuple(parse_portal(one, PORT_MONITOR, field="rbd.monitors") for one in _rbd(pool).monitors)


def _knock(portals: Sequence[Portal]) -> None:
    """Raise Unavailable where none of them answers; one of several monitors is enough."""
    refusals = []
    for portal in portals:
        try:
            socket.create_connection((portal.host, portal.port), timeout=CONNECT_TIMEOUT_S / len(portals)).close()
        except OSError as error:
            refusals.append(f"{portal.host}:{portal.port} does not answer ({error})")
        else:
            return
    raise Unavailable("pool-hung", "; ".join(refusals)[:400])


def _observe_thin(pool: PoolSpec, run: Run, now_ms: int) -> PoolObservation:
    """Return the thin pool's space; what is used is its blocks or the room for their addresses, whichever is scarcer: at the end of
    either it takes no more writes."""
    lvm = _lvm(pool)
    fields = "lv_size,data_percent,metadata_percent"
    report = ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields]
    code, output, complaint = run(["lvs", *report, "--", f"{lvm.volume_group}/{lvm.thin_pool}"], None)
    if code:
        raise _lvm_failure(lvm, complaint)
    (row,) = json.loads(output)["report"][0]["lv"]
    size_bytes = int(row["lv_size"])
    used = max(float(row[percent] or 0) for percent in ("data_percent", "metadata_percent"))
    available_bytes = size_bytes - int(size_bytes * used / 100)
    return PoolObservation(
        pool_id=pool.pool_id,
        capacity_bytes=size_bytes,
        available_bytes=available_bytes,
        written_bytes=_written_thin(lvm, run),
        observed_at_ms=now_ms,
    )


def _written_thin(lvm: LvmSource, run: Run) -> int | None:
    """Return what our volumes have allocated of their sizes; those of others in the same thin pool are none of ours."""
    fields = "lv_name,pool_lv,lv_size,data_percent"
    report = ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields]
    code, output, _complaint = run(["lvs", *report, "--", lvm.volume_group], None)
    if code:
        return None
    ours = [
        row
        for row in json.loads(output)["report"][0]["lv"]
        if row["pool_lv"] == lvm.thin_pool and row["lv_name"].startswith(_VOLUME_ID_PREFIX)
    ]
    return sum(int(int(row["lv_size"]) * float(row["data_percent"] or 0) / 100) for row in ours)


def observe_ceph(pool: PoolSpec, secret: bytes, run: Run, now_ms: int) -> PoolObservation:
    """Return the pool's space as the cluster counts it. Conflict where the cluster has no such pool."""
    command = ["ceph", *_ceph_options(pool), "--connect-timeout", "5", "df", "--format", "json"]
    code, output, complaint = run(command, secret)
    if code:
        _raise_network(pool, complaint)
    found = {one["name"]: one["stats"] for one in json.loads(output)["pools"]}
    name = _rbd(pool).pool
    if not found:
        # Its managers count, and none of them is up: what is stored goes on being read and written, only nobody says how much it is.
        return PoolObservation(pool_id=pool.pool_id, observed_at_ms=now_ms)
    if name not in found:
        raise Conflict("ceph-pool-missing", f"the cluster has no pool {name}; it has {', '.join(sorted(found))[:200]}")
    stored, available = int(found[name]["stored"]), int(found[name]["max_avail"])
    return PoolObservation(
        pool_id=pool.pool_id, capacity_bytes=stored + available, available_bytes=available, observed_at_ms=now_ms
    )


# --- volumes ---------------------------------------------------------------------------------------------------------------


def ensure_volume(volume: VolumeSpec, pool: PoolSpec, secret: bytes | None, run: Run | None = None) -> VolumeObservation:
    """Make the volume, or find the LUN that it is. Conflict: it has another size, which is told; NotFound: no such LUN."""
    _check_volume(volume)
    seen = observe_volume(volume, pool, secret, run)
    if not seen.is_present and pool.kind is PoolKind.ISCSI:
        raise NotFound("lun-not-found", f"target {_iscsi(pool).target} has no LUN {volume.unit}", unit=volume.unit)
    if not seen.is_present:
        _make(volume, pool, secret, run or run_command)
        seen = observe_volume(volume, pool, secret, run)
    if seen.size_bytes != volume.size_bytes:
        what = f"LUN {volume.unit} of {_iscsi(pool).target}" if pool.kind is PoolKind.ISCSI else f"volume {volume.volume_id}"
        raise Conflict(
            "volume-differs",
            f"{what} has {seen.size_bytes} bytes, not {volume.size_bytes}: say its own size",
            size_bytes=seen.size_bytes,
        )
    return seen


def observe_volume(volume: VolumeSpec, pool: PoolSpec, secret: bytes | None, run: Run | None = None) -> VolumeObservation:
    check(pool)
    call = run or run_command
    if pool.kind is PoolKind.LVM_THIN:
        return _observe_logical(volume.volume_id, _lvm(pool), call)
    code, output, complaint = call(info_command(volume, pool), secret)
    if code == 0:
        size_bytes = int(json.loads(output)["virtual-size"])
        return VolumeObservation(volume_id=volume.volume_id, is_present=True, size_bytes=size_bytes, allocated_bytes=size_bytes)
    if _says_absent(complaint):
        return VolumeObservation(volume_id=volume.volume_id, is_present=False)
    _raise_network(pool, complaint)


def grow_volume(volume: VolumeSpec, pool: PoolSpec, secret: bytes | None, run: Run | None = None) -> VolumeObservation:
    """Grow it. Conflict (`lun-fixed`): a LUN grows on its server only, and its volume follows."""
    seen = observe_volume(volume, pool, secret, run)
    if not seen.is_present:
        raise NotFound("volume-not-found", f"volume {volume.volume_id} is not in pool {pool.pool_id}")
    if seen.size_bytes > volume.size_bytes:
        message = f"volume {volume.volume_id} has {seen.size_bytes} bytes; it can grow, not shrink to {volume.size_bytes}"
        raise InvalidRequest("volume-shrink", message, field="size_bytes")
    if seen.size_bytes < volume.size_bytes:
        _work(grow_command(volume, pool), pool, secret, run or run_command)
    return observe_volume(volume, pool, secret, run)


def delete_volume(volume: VolumeSpec, pool: PoolSpec, secret: bytes | None, run: Run | None = None) -> None:
    """Remove it; a LUN stays as it is, with what is on it."""
    check(pool)
    if pool.kind is PoolKind.ISCSI or not observe_volume(volume, pool, secret, run).is_present:
        return
    call = run or run_command
    if pool.kind is PoolKind.RBD:
        # An image with snapshots cannot be removed; those that its layers were go with it.
        ask_rbd(("snap", "purge", "--no-progress", "--", rbd_image(pool, volume.volume_id)), pool, secret, call)
    _work(delete_command(volume, pool), pool, secret, call)


def ask_rbd(words: Sequence[str], pool: PoolSpec, secret: bytes | None, run: Run) -> str:
    """Run a verb of Ceph's `rbd` as the pool's user; return what it prints. Raises what the cluster answers as an error of ours."""
    code, output, complaint = run(["rbd", *_ceph_options(pool), *words], secret)
    if code:
        _raise_network(pool, complaint)
    return output


def rbd_image(pool: PoolSpec, volume_id: str) -> str:
    """Return how Ceph's tools name the image that the volume is."""
    return f"{_rbd(pool).pool}/{check_id(volume_id, 'volume_id')}"


def info_command(volume: VolumeSpec, pool: PoolSpec) -> list[str]:
    return ["qemu-img", "info", "--output=json", *_secret_object(pool), "--image-opts", image_options(volume, pool)]


def image_options(volume: VolumeSpec, pool: PoolSpec) -> str:
    """Return how `qemu-img` opens what is in the network. Every value was checked by a pattern that knows no comma."""
    if pool.kind is PoolKind.ISCSI:
        iscsi = _iscsi(pool)
        portal = parse_portal(iscsi.portal, PORT_ISCSI, field="iscsi.portal")
        return iscsi_options(portal, iscsi.target, lun_of(volume.volume_id, volume.unit), iscsi.chap_user)
    rbd = _rbd(pool)
    monitors = [parse_portal(one, PORT_MONITOR, field="rbd.monitors") for one in rbd.monitors]
    return rbd_options(monitors, rbd.pool, check_id(volume.volume_id, "volume_id"), rbd.user)


def iscsi_options(portal: Portal, target: str, lun: int, chap_user: str) -> str:
    """Return how QEMU's tools open a LUN; its password is the secret object `SECRET_ID`."""
    host = f"[{portal.host}]" if ":" in portal.host else portal.host
    opened = f"driver=iscsi,transport=tcp,portal={host}:{portal.port},target={target},lun={lun}"
    return opened + (f",user={chap_user},password-secret={SECRET_ID}" if chap_user else "")


def rbd_options(monitors: Sequence[Portal], pool: str, image: str, user: str) -> str:
    """Return how QEMU's tools open an image of a Ceph pool; the user's key is the secret object `SECRET_ID`."""
    servers = "".join(f",server.{i}.host={one.host},server.{i}.port={one.port}" for i, one in enumerate(monitors))
    return f"driver=rbd,pool={pool},image={image},user={user},auth-client-required.0=cephx,key-secret={SECRET_ID}{servers}"


def secret_object(path: str, *, is_ceph_key: bool) -> str:
    """Return the object that holds a pool's secret. QEMU writes a Ceph key in base64 by itself, so it is told that it is that already."""
    return f"secret,id={SECRET_ID}{',format=base64' if is_ceph_key else ''},file={path}"


def make_command(volume: VolumeSpec, pool: PoolSpec) -> list[str]:
    name = check_id(volume.volume_id, "volume_id")
    if pool.kind is PoolKind.LVM_THIN:
        lvm = _lvm(pool)
        thin = ["--thinpool", lvm.thin_pool, "--virtualsize", f"{volume.size_bytes}b"]
        return ["lvcreate", "--quiet", "--yes", "--wipesignatures", "n", "--name", name, *thin, "--", lvm.volume_group]
    return ["rbd", *_ceph_options(pool), "create", "--size", f"{volume.size_bytes}B", "--", f"{_rbd(pool).pool}/{name}"]


def grow_command(volume: VolumeSpec, pool: PoolSpec) -> list[str]:
    name = check_id(volume.volume_id, "volume_id")
    match pool.kind:
        case PoolKind.LVM_THIN:
            return ["lvextend", "--quiet", "--size", f"{volume.size_bytes}b", "--", f"{_lvm(pool).volume_group}/{name}"]
        case PoolKind.RBD:
            return ["rbd", *_ceph_options(pool), "resize", "--size", f"{volume.size_bytes}B", "--", f"{_rbd(pool).pool}/{name}"]
    raise Conflict("lun-fixed", f"volume {name} is a LUN: grow it on its server, then say its new size")


def delete_command(volume: VolumeSpec, pool: PoolSpec) -> list[str]:
    name = check_id(volume.volume_id, "volume_id")
    if pool.kind is PoolKind.LVM_THIN:
        return ["lvremove", "--quiet", "--yes", "--", f"{_lvm(pool).volume_group}/{name}"]
    return ["rbd", *_ceph_options(pool), "rm", "--no-progress", "--", f"{_rbd(pool).pool}/{name}"]


def _ceph_options(pool: PoolSpec) -> list[str]:
    rbd = _rbd(pool)
    monitors = [parse_portal(one, PORT_MONITOR, field="rbd.monitors") for one in rbd.monitors]
    hosts = ",".join(f"[{one.host}]:{one.port}" if ":" in one.host else f"{one.host}:{one.port}" for one in monitors)
    return ["--conf", "/dev/null", "--mon-host", hosts, "--id", rbd.user, "--keyfile", SECRET_FILE]


def _secret_object(pool: PoolSpec) -> list[str]:
    return ["--object", secret_object(SECRET_FILE, is_ceph_key=pool.kind is PoolKind.RBD)] if needs_secret(pool) else []


def _check_volume(volume: VolumeSpec) -> None:
    sources = (volume.base_image_id, volume.copy_image_id, volume.base_volume_id, volume.copy_volume_id, volume.layer_id)
    if volume.format is not DiskFormat.RAW or any(sources) or volume.is_encrypted:
        raise InvalidRequest(
            "volume-not-plain", "a volume of this pool is raw and empty: no image, no layers, no encryption", field="format"
        )


def _make(volume: VolumeSpec, pool: PoolSpec, secret: bytes | None, run: Run) -> None:
    _work(make_command(volume, pool), pool, secret, run)


def _work(command: Sequence[str], pool: PoolSpec, secret: bytes | None, run: Run) -> None:
    code, _output, complaint = run(command, secret)
    if not code:
        return
    if pool.kind is PoolKind.LVM_THIN:
        raise _lvm_failure(_lvm(pool), complaint)
    _raise_network(pool, complaint)


def _observe_logical(volume_id: str, lvm: LvmSource, run: Run) -> VolumeObservation:
    name = f"{lvm.volume_group}/{check_id(volume_id, 'volume_id')}"
    fields = "lv_size,data_percent"
    command = ["lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields, "--", name]
    code, output, complaint = run(command, None)
    if code:
        if "failed to find logical volume" in complaint.lower():
            return VolumeObservation(volume_id=volume_id, is_present=False)
        raise _lvm_failure(lvm, complaint)
    (row,) = json.loads(output)["report"][0]["lv"]
    size_bytes = int(row["lv_size"])
    allocated = int(size_bytes * float(row["data_percent"] or 0) / 100)
    return VolumeObservation(volume_id=volume_id, is_present=True, size_bytes=size_bytes, allocated_bytes=allocated)


def _lvm_failure(lvm: LvmSource, complaint: str) -> TrimtabError:
    said, lowered = complaint.strip()[:300], complaint.lower()
    if "insufficient free space" in lowered or "no space left" in lowered:
        return NoCapacity("pool-full", f"thin pool {lvm.volume_group}/{lvm.thin_pool} has no room left ({said})")
    if "not found" in lowered or "failed to find" in lowered:
        return Conflict(
            "lvm-not-here", f"this host has no thin pool {lvm.volume_group}/{lvm.thin_pool}; see `lvs` there ({said})"
        )
    return Unavailable("lvm-failed", f"LVM on this host says: {said}")


def _says_absent(complaint: str) -> bool:
    lowered = complaint.lower()
    return "no such file or directory" in lowered or "logical unit not supported" in lowered or "lun not supported" in lowered


def _raise_network(pool: PoolSpec, complaint: str) -> NoReturn:
    said, lowered = complaint.strip()[-300:], complaint.lower()
    if "authentication" in lowered or "authorization" in lowered or "permission" in lowered:
        raise Conflict("pool-refused", f"the storage of pool {pool.name or pool.pool_id} refuses user or password ({said})")
    if "target not found" in lowered:
        raise Conflict("target-not-found", f"the portal of pool {pool.name or pool.pool_id} knows no such target ({said})")
    raise Unavailable("pool-hung", f"the storage of pool {pool.name or pool.pool_id} does not answer ({said})")


# --- running ---------------------------------------------------------------------------------------------------------------


def run_command(command: Sequence[str], secret: bytes | None, *, timeout_s: float = COMMAND_TIMEOUT_S) -> tuple[int, str, str]:
    """Run it within its time; the secret is in a file in memory that only it has."""
    with in_memory(secret) as descriptor:
        words = [word.replace(SECRET_FILE, f"/proc/self/fd/{descriptor}") for word in command]
        try:
            ended = subprocess.run(
                words,
                check=False,
                capture_output=True,
                text=True,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
                timeout=timeout_s,
                stdin=subprocess.DEVNULL,
                pass_fds=() if descriptor is None else (descriptor,),
            )
        except subprocess.TimeoutExpired:
            return 124, "", "timed out"
        except FileNotFoundError:
            return 127, "", f"{words[0]} is not installed on this host"
    return ended.returncode, ended.stdout, ended.stderr


def _words(pattern: "re.Pattern[str]", text: str, field: str, example: str) -> None:
    if pattern.fullmatch(text) is None:
        raise InvalidRequest("pool-source-wrong", f"{field}: {text[:100]!r} must be such as {example}", field=field)


def _iscsi(pool: PoolSpec) -> IscsiSource:
    return _given(pool, pool.iscsi)


def _lvm(pool: PoolSpec) -> LvmSource:
    return _given(pool, pool.lvm)


def _rbd(pool: PoolSpec) -> RbdSource:
    return _given(pool, pool.rbd)


def _given(pool: PoolSpec, source: T | None) -> T:
    if source is None:
        raise InvalidRequest("pool-source-missing", f"pool {pool.pool_id} of kind {pool.kind} says nothing of it", field="kind")
    return source

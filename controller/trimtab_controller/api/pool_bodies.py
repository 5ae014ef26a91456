"""What a new pool is asked to be: fields of every kind, each refused where it is another kind's."""

from typing import Annotated, Literal

from pydantic import Field

from trimtab_controller.api.fields import Body, Bool, Name, PoolPath
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.pool_messages import IscsiSource, LvmSource, NfsSource, RbdSource

_HOST = r"([A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:]{2,45}\])(:[0-9]{1,5})?"
Portal = Annotated[str, Field(pattern=f"^{_HOST}$", examples=["10.0.0.5:3260"])]
_OF_KINDS = {
    "server": ("nfs",),
    "portal": ("iscsi",),
    "target": ("iscsi",),
    "chap_user": ("iscsi",),
    "volume_group": ("lvm_thin",),
    "thin_pool": ("lvm_thin",),
    "monitors": ("rbd",),
    "ceph_pool": ("rbd",),
    "ceph_user": ("rbd",),
    "secret": ("iscsi", "rbd"),
    "path": ("dir", "nfs"),
}


class PoolBody(Body):
    name: Name
    kind: Literal["dir", "nfs", "iscsi", "lvm_thin", "rbd"] = "dir"
    # A directory of the hosts, or the export of an NFS server.
    path: PoolPath = ""
    is_shared: Bool = False
    is_default: Bool = False
    # What placement leaves free, in thousandths.
    reserve_permille: Annotated[int, Field(strict=True, ge=0, le=900, examples=[50])] = 50
    # Of kind nfs.
    server: Annotated[str, Field(pattern=r"^([A-Za-z0-9:][A-Za-z0-9.:-]{0,252})?$", examples=["nas"])] = ""
    is_soft: Bool = False
    timeout_s: Annotated[int, Field(strict=True, ge=1, le=600, examples=[60])] = 60
    retries: Annotated[int, Field(strict=True, ge=1, le=100, examples=[2])] = 2
    nfs_version: Literal["3", "4.0", "4.1", "4.2"] = "4.2"
    # Of kind iscsi: address and port, the target's name, and who is to be said to ask.
    portal: Annotated[str, Field(pattern=f"^({_HOST})?$", examples=["10.0.0.5:3260"])] = ""
    target: Annotated[
        str,
        Field(pattern=r"^((iqn\.[0-9]{4}-[0-9]{2}\.|eui\.|naa\.)[A-Za-z0-9.:-]{1,200})?$", examples=["iqn.2026-01.example:san"]),
    ] = ""
    chap_user: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:@-]{0,127})?$", examples=["fleet"])] = ""
    # Of kind lvm_thin: a thin pool that is there on the hosts.
    volume_group: Annotated[str, Field(pattern=r"^([A-Za-z0-9_+][A-Za-z0-9_+.-]{0,126})?$", examples=["vg0"])] = ""
    thin_pool: Annotated[str, Field(pattern=r"^([A-Za-z0-9_+][A-Za-z0-9_+.-]{0,126})?$", examples=["thin"])] = ""
    # Of kind rbd.
    monitors: Annotated[tuple[Portal, ...], Field(max_length=16, examples=[["10.0.0.5:6789"]])] = ()
    ceph_pool: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:@-]{0,127})?$", examples=["vms"])] = ""
    ceph_user: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:@-]{0,127})?$", examples=["trimtab"])] = ""
    # The password of `chap_user`, or the key of `ceph_user`; kept sealed and never shown.
    secret: Annotated[str, Field(pattern=r"^[!-~]*$", max_length=255, examples=["a-long-password"])] = ""

    def nfs_source(self) -> NfsSource | None:
        """Return what is mounted. InvalidRequest where a field is missing, or another kind's."""
        self._refuse_others()
        if self.kind in {"dir", "nfs"}:
            self._require("path")
        if self.kind != "nfs":
            return None
        self._require("server")
        return NfsSource(
            server=self.server,
            export=self.path,
            is_soft=self.is_soft,
            timeout_s=self.timeout_s,
            retries=self.retries,
            version=self.nfs_version,
        )

    def behind(self) -> IscsiSource | LvmSource | RbdSource | None:
        """Return what lies behind a pool without files."""
        match self.kind:
            case "iscsi":
                self._require(
                    "portal", "target", *(("secret",) if self.chap_user else ()), *(("chap_user",) if self.secret else ())
                )
                return IscsiSource(portal=self.portal, target=self.target, chap_user=self.chap_user)
            case "lvm_thin":
                self._require("volume_group", "thin_pool")
                return LvmSource(volume_group=self.volume_group, thin_pool=self.thin_pool)
            case "rbd":
                self._require("monitors", "ceph_pool", "ceph_user", "secret")
                return RbdSource(monitors=self.monitors, pool=self.ceph_pool, user=self.ceph_user)
        return None

    def _require(self, *fields: str) -> None:
        for field in fields:
            if not getattr(self, field):
                raise InvalidRequest(
                    f"{field.replace('_', '-')}-missing", f"{field}: a pool of kind {self.kind} needs it", field=field
                )

    def _refuse_others(self) -> None:
        for field, kinds in _OF_KINDS.items():
            if getattr(self, field) and self.kind not in kinds:
                told = " or ".join(kinds)
                raise InvalidRequest(
                    f"{field.replace('_', '-')}-not-taken", f"{field}: only a pool of kind {told} has it", field=field
                )

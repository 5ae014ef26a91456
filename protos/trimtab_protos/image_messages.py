"""Where the content of an image comes from. As `messages.py`, which is full."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadSource:
    upload_id: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlSource:
    url: str
    allowed_networks: tuple[str, ...] = ()
    ca_pem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFileSource:
    file_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSource:
    host_id: str
    address: str
    pool_id: str
    ticket: str
    stored_sha256: str
    file_size_bytes: int
    virtual_size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSource:
    volume_id: str
    layer_id: str = ""

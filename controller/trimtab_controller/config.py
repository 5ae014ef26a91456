"""What an operator may set: flags over environment (`TRIMTAB_*`) over `<data-dir>/controller.toml` over these defaults.

Nothing is read when this module is imported; `load` builds one frozen `Settings` that `main.py` hands to every part.
"""

import ipaddress
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from trimtab_protos.errors import InvalidRequest

DEFAULT_DATA_DIRECTORY = Path("/var/lib/trimtab")
FILE_NAME = "controller.toml"
PROCESSES = ("api", "engine", "gateway", "worker")
"""The children of `all`, in the order of their metrics ports."""

Port = Annotated[int, Field(ge=1, le=65535)]
Addresses = Annotated[tuple[str, ...], NoDecode]

_HOST_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9]([a-z0-9-]{0,62}))*", re.IGNORECASE)
_NORTHBOUND = re.compile(r"(?:tcp|ssl):([0-9.]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}|unix:/[^,\s]+")
_UNIX_SOCKET_PATH_MAX = 100  # the kernel takes 107 bytes


class Settings(BaseSettings):
    """Settings of one controller node. Times in the unit of their names."""

    model_config = SettingsConfigDict(env_prefix="TRIMTAB_", frozen=True, extra="forbid")

    data_dir: Path = DEFAULT_DATA_DIRECTORY
    database_url: str = ""
    """Empty: SQLite in the data directory. PostgreSQL: `postgresql+psycopg://USER@HOST/NAME`."""
    redis_url: str = ""
    """Empty: a private redis-server on a unix socket, started by `trimtab-controller all`."""
    redis_server: str = ""
    """Path of the redis-server (or valkey-server) program; empty: looked up on PATH."""

    advertise: Addresses = ("127.0.0.1",)
    """Addresses or names under which hosts and users reach this node; the first stands in join commands."""
    gateways: Addresses = ()
    """`ADDRESS:PORT` of every gateway of the fleet where there are several nodes; empty: this node's own."""
    bind_address: str = "0.0.0.0"  # noqa: S104 a controller is there to be reached; every port but metrics asks for credentials
    api_port: Port = 8443
    gateway_port: Port = 8444
    join_port: Port = 8445
    metrics_port: Port = 9108
    """Of the api; engine, gateway and worker take the next three."""
    metrics_bind_address: str = "0.0.0.0"  # noqa: S104 scraped from elsewhere; figures only, no names of vms

    rebalance_mode: Literal["off", "advise", "automatic"] = "off"
    """What the leader does about uneven load: nothing, keep plans for review, or apply them too."""

    ovn_northbound: str = ""
    """OVN's northbound database, as in `ssl:192.0.2.10:6641` or `unix:/run/ovn/ovnnb_db.sock`, those of a cluster with commas
    between; empty: no overlay networks."""
    ovn_certificate: Path | None = None
    """Of an `ssl:` endpoint, with the two below: what this controller shows, its key, and the authority (PEM) of the database's."""
    ovn_key: Path | None = None
    ovn_authority: Path | None = None

    agent_metrics_port: Port = 9107
    """Where Prometheus is told to scrape agents."""

    api_certificate: Path | None = None
    """One's own certificate (PEM, with its chain) for the API, in place of the fleet's."""
    api_key: Path | None = None

    lease_ttl_s: Annotated[float, Field(ge=1, le=300)] = 15.0
    """Life of a host's lease, of a gateway's right to grant and of the leader's term."""
    lease_renew_s: Annotated[float, Field(ge=0.1, le=100)] = 5.0
    """How often gateways and the leader renew their own rows."""
    heartbeat_s: Annotated[float, Field(ge=0.1, le=60)] = 3.0
    suspect_after_s: Annotated[float, Field(ge=0.5, le=300)] = 6.0
    """Silence of two heartbeats, after which a host is suspect."""
    lost_after_s: Annotated[float, Field(ge=1, le=3600)] = 9.5
    """Silence after which a suspect host is called lost; no word about its guests. By more than one heartbeat longer than
    `suspect_after_s`, so that hosts which were cut off at one instant are all suspect before the first is lost."""

    drift_period_s: Annotated[float, Field(ge=1, le=3600)] = 30.0
    """How often the next 200 hosts are asked for all their domains; what they tell by themselves is heard at once."""
    recover_lost_after_s: Annotated[float, Field(ge=1, le=7 * 86400)] = 300.0
    """How long after the proof that a host is off its vms on local storage come back from their backups, where their policy says so: a
    host that only rebooted brings its disks back within this, and loses nothing."""

    read_backups_again_days: Annotated[float, Field(ge=0, le=3650)] = 30.0
    """How long after a backup was read back its records are read once more, one backup at a time; 0: never."""

    agent_certificate_hours: Annotated[float, Field(gt=0, le=24 * 365)] = 72.0
    controller_certificate_days: Annotated[float, Field(gt=0, le=365)] = 30.0
    host_token_minutes: Annotated[float, Field(gt=0, le=24 * 60)] = 15.0
    clock_skew_max_s: Annotated[float, Field(gt=0, le=60)] = 2.0

    worker_threads: Annotated[int, Field(ge=1, le=256)] = 16
    upload_max_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 40
    image_url_hosts: Addresses = ()
    """Host names from which images may be imported by https; empty: import by URL is off; `*`: any public host."""
    image_url_networks: Addresses = ()
    """Networks besides the public ones where such a host may be, as in `10.20.0.0/16`: a mirror of one's own."""
    rate_limit_per_s: Annotated[float, Field(gt=0, le=100_000)] = 50.0
    """Mutations per second and user; reads get four times as many."""
    log_format: Annotated[str, Field(pattern="^(auto|json|console)$")] = "auto"
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"

    @field_validator("advertise", "gateways", "image_url_hosts", "image_url_networks", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """The environment and flags give one string, `10.0.0.1,10.0.0.2`."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("advertise")
    @classmethod
    def _check_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("at least one address, as in 192.0.2.10")
        for address in value:
            if not is_ip_address(address) and not _HOST_NAME.fullmatch(address):
                raise ValueError(f"{address!r} is neither an IP address nor a host name; as in 192.0.2.10")
        return value

    @field_validator("image_url_networks")
    @classmethod
    def _check_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"{error}; a network, as in 10.20.0.0/16") from error
        return value

    @field_validator("ovn_northbound")
    @classmethod
    def _check_northbound(cls, value: str) -> str:
        if value and not all(_NORTHBOUND.fullmatch(part) for part in value.split(",")):
            raise ValueError(f"{value!r} is no endpoint of OVN's northbound database; as in ssl:192.0.2.10:6641")
        return value

    @model_validator(mode="after")
    def _check_times(self) -> "Settings":
        if not self.heartbeat_s * 3 <= self.lease_ttl_s:
            raise ValueError("lease_ttl_s must be at least three times heartbeat_s: two lost beats must not end a lease")
        if not self.lease_renew_s * 2 < self.lease_ttl_s:
            raise ValueError("lease_ttl_s must be more than twice lease_renew_s: one lost renewal must not end it")
        if not self.suspect_after_s + self.heartbeat_s < self.lost_after_s:
            raise ValueError("lost_after_s must be more than suspect_after_s and one heartbeat_s together")
        if (self.api_certificate is None) != (self.api_key is None):
            raise ValueError("api_certificate and api_key go together")
        if "ssl:" in self.ovn_northbound and None in (self.ovn_certificate, self.ovn_key, self.ovn_authority):
            raise ValueError("an ovn_northbound of ssl: takes ovn_certificate, ovn_key and ovn_authority")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        chosen = init_settings().get("data_dir") or env_settings().get("data_dir") or DEFAULT_DATA_DIRECTORY
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Path(chosen) / FILE_NAME)

    # Places in the data directory, all private to the controller's user.

    @property
    def file(self) -> Path:
        return self.data_dir / FILE_NAME

    @property
    def pki_dir(self) -> Path:
        return self.data_dir / "pki"

    @property
    def ca_bundle_path(self) -> Path:
        """PEM of every CA that is trusted now: one, or two during a rotation."""
        return self.pki_dir / "ca.pem"

    @property
    def controller_certificate_path(self) -> Path:
        """Server certificate of api, gateway and join; client certificate towards agents."""
        return self.pki_dir / "controller.pem"

    @property
    def controller_key_path(self) -> Path:
        return self.pki_dir / "controller.key"

    @property
    def uploads_dir(self) -> Path:
        return self.data_dir / "uploads"

    @property
    def admin_token_path(self) -> Path:
        return self.data_dir / "admin.token"

    @property
    def redis_socket(self) -> Path:
        """Socket of the private redis-server."""
        path = self.data_dir / "redis" / "redis.sock"
        if len(str(path.absolute())) > _UNIX_SOCKET_PATH_MAX:
            raise InvalidRequest(
                "data-dir-too-long",
                f"data_dir: {self.data_dir} is too long for a socket below it; at most 85 characters, as in /var/lib/trimtab",
                field="data_dir",
            )
        return path

    @property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'trimtab.db'}"

    @property
    def is_redis_private(self) -> bool:
        return not self.redis_url

    @property
    def effective_redis_url(self) -> str:
        """As redis-py takes it."""
        return self.redis_url or f"unix://{self.redis_socket.absolute()}"

    @property
    def broker_url(self) -> str:
        """As Celery takes it."""
        if self.effective_redis_url.startswith("unix://"):
            return "redis+socket://" + self.effective_redis_url.removeprefix("unix://")
        return self.effective_redis_url

    @property
    def gateway_addresses(self) -> tuple[str, ...]:
        return self.gateways or tuple(join_host_port(address, self.gateway_port) for address in self.advertise)

    @property
    def join_addresses(self) -> tuple[str, ...]:
        return tuple(join_host_port(address, self.join_port) for address in self.advertise)

    @property
    def api_urls(self) -> tuple[str, ...]:
        return tuple(f"https://{join_host_port(address, self.api_port)}" for address in self.advertise)

    def metrics_port_of(self, process: str) -> int:
        return self.metrics_port + PROCESSES.index(process)


def load(**flags: Any) -> Settings:
    """Return the settings; a flag that is None was not given. Raises InvalidRequest naming the field that is wrong."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "settings"
        raise InvalidRequest("settings-invalid", f"{field}: {first['msg'].removeprefix('Value error, ')}", field=field) from error
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise InvalidRequest("settings-unreadable", f"{FILE_NAME} cannot be read: {error}", field=FILE_NAME) from error


def write_file(settings: Settings, **given: Any) -> None:
    """Write `controller.toml` with what `init` was told and the defaults that an operator is likely to change."""
    shown: dict[str, Any] = {
        "advertise": list(settings.advertise),
        "database_url": settings.effective_database_url,
        "redis_url": settings.redis_url,
        "bind_address": settings.bind_address,
        "api_port": settings.api_port,
        "gateway_port": settings.gateway_port,
        "join_port": settings.join_port,
        "metrics_port": settings.metrics_port,
        **given,
    }
    lines = ["# Settings of this controller node. Environment variables TRIMTAB_<NAME> and flags go over this file."]
    lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in shown.items()]
    descriptor = os.open(settings.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def join_host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"

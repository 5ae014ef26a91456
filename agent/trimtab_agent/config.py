"""What this host's agent is told: flags over environment (`TRIMTAB_*`) over `agent.toml` over these defaults.

`agent.toml` is written by the join and removed when the host leaves; nothing is read when this module is imported.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from trimtab_agent.ballooning import DEFAULT_HIGH_PERMILLE, DEFAULT_LOW_PERMILLE
from trimtab_agent.certificates import write_file
from trimtab_protos.errors import InvalidRequest

DEFAULT_PATH = Path("/var/lib/trimtab/agent.toml")
AGENT_PORT = 8446
METRICS_PORT = 9107
"""The controller's service discovery tells Prometheus this port for every agent unless it is set otherwise there too."""

Addresses = Annotated[tuple[str, ...], NoDecode]
HostPort = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:.]+\]|[0-9A-Za-z.-]+):[0-9]{1,5}$")]

_file: Path | None = None
"""The file of the `load` under way: pydantic-settings asks for sources on the class, not on the instance."""


class Settings(BaseSettings):
    """Settings of one agent."""

    model_config = SettingsConfigDict(env_prefix="TRIMTAB_", frozen=True, extra="forbid")

    host_id: Annotated[str, Field(pattern=r"^host-[0-9a-z][0-9a-z_-]{0,63}$")]
    gateway_addresses: Addresses
    """`ADDRESS:PORT` of gateways; later ones come from the controller and are kept beside this file."""
    agent_address: HostPort
    """Where the controller and other hosts reach this agent."""
    migration_address: str
    """Numeric address at which guests arrive."""
    listen_address: HostPort = f"0.0.0.0:{AGENT_PORT}"
    metrics_address: str = f"0.0.0.0:{METRICS_PORT}"
    """Empty: no metrics are served."""

    state_dir: Path = Path("/var/lib/trimtab")
    certificate_dir: Path = Path("/etc/trimtab")
    runtime_dir: Path = Path("/run/trimtab")

    hypervisor: Annotated[str, Field(pattern="^(kvm|simulated)$")] = "kvm"
    libvirt_uri: str = "qemu:///system"
    imports_at_once: Annotated[int, Field(ge=1, le=16)] = 2
    migrations_at_once: Annotated[int, Field(ge=1, le=16)] = 2

    balloon_low_permille: Annotated[int, Field(ge=0, le=999)] = DEFAULT_LOW_PERMILLE
    balloon_high_permille: Annotated[int, Field(ge=1, le=1000)] = DEFAULT_HIGH_PERMILLE
    """Of this host's memory that is available: below the low mark guests with a balloon give, above the high one they get back."""

    lease_fencing: Literal["auto", "on", "off"] = "auto"
    """Whether the warden ends guests that may start elsewhere when this host's lease ends, so that they come back without a power
    device. `auto`: while the beacon renews, so that nothing that runs ends because the controllers do. `on`: always; without a beacon a
    controller that is away for longer than a lease costs those guests. `off`: never."""

    beacon: bool = True
    """Whether the host renews its lease on shared storage as well, where it has a shared pool."""

    beacon_pool_id: Annotated[str, Field(pattern=r"^(pool-[0-9a-z][0-9a-z_-]{0,34})?$")] = ""
    """The shared pool in which it does. Empty: the first of those it knows."""

    log_format: Annotated[str, Field(pattern="^(auto|json|console)$")] = "auto"
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"

    @field_validator("lease_fencing", mode="before")
    @classmethod
    def _as_word(cls, value: object) -> object:
        """Joins of earlier releases wrote true or false."""
        return {"true": "on", "false": "off"}.get(str(value).lower(), value)

    @field_validator("gateway_addresses", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """The environment and flags give one string, `192.0.2.1:8444,192.0.2.2:8444`."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

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
        if _file is None:
            return init_settings, env_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _file)

    # Places in the state directory.

    @property
    def journal_path(self) -> Path:
        return self.state_dir / "journal.db"

    @property
    def gateways_path(self) -> Path:
        """JSON list of the gateways that the controller told last."""
        return self.state_dir / "gateways.json"

    @property
    def lock_path(self) -> Path:
        return self.state_dir / "agent.lock"


def load(path: Path, **flags: Any) -> Settings:
    """Return the settings; a flag that is None was not given. InvalidRequest names the field that is wrong or missing."""
    global _file
    if not path.exists():
        raise InvalidRequest(
            "not-a-member", f"{path} is missing: this host is in no fleet; join it with `trimtab-agent join`", path=path
        )
    given = {name: value for name, value in flags.items() if value is not None}
    _file = path
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "settings"
        raise InvalidRequest("settings-invalid", f"{path.name}: {field}: {first['msg']}", field=field) from error
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise InvalidRequest("settings-unreadable", f"{path} cannot be read: {error}", path=path) from error
    finally:
        _file = None


def render(values: Mapping[str, Any]) -> str:
    """Return `agent.toml` with these values. JSON's strings, numbers, booleans and lists are TOML's too."""
    lines = ["# Written by `trimtab-agent join`. Environment variables TRIMTAB_<NAME> and flags go over this file."]
    lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def known_gateways(settings: Settings) -> tuple[str, ...]:
    """Return the gateways that the controller told last, else those of the join."""
    try:
        told = json.loads(settings.gateways_path.read_text())
    except (OSError, ValueError):
        return settings.gateway_addresses
    return tuple(str(address) for address in told) or settings.gateway_addresses


def remember_gateways(settings: Settings, addresses: tuple[str, ...]) -> None:
    if addresses and addresses != known_gateways(settings):
        write_file(settings.gateways_path, json.dumps(list(addresses)).encode(), mode=0o600)

"""The fields of requests: every one with its bound and an example, so that a refusal can show both."""

import uuid
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"
HOST_NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
LABEL_KEY_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE_PATTERN = r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"
# The largest integer that every client's JSON keeps exactly.
INT_MAX = 2**53 - 1
TIB = 1 << 40


def _text(pattern: str, example: str, *, max_length: int = 63) -> Any:
    return Field(pattern=pattern, max_length=max_length, examples=[example])


Name = Annotated[str, _text(NAME_PATTERN, "web1")]
HostName = Annotated[str, _text(HOST_NAME_PATTERN, "node1")]
# A name or an id in a body.
Ref = Annotated[str, _text(HOST_NAME_PATTERN, "default")]
LabelKey = Annotated[str, Field(pattern=LABEL_KEY_PATTERN, examples=["tier"])]
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE_PATTERN, examples=["web"])]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=64, examples=[{"tier": "web"}])]
LabelChanges = Annotated[dict[LabelKey, LabelValue | None], Field(max_length=64, examples=[{"tier": "web", "old": None}])]

# What operators count on hosts, and how much of it.
Counts = Annotated[
    dict[LabelKey, Annotated[int, Field(strict=True, ge=1, le=1 << 40, examples=[1])]],
    Field(max_length=16, examples=[{"licence": 1}]),
]

ResourceCount = Annotated[int, Field(strict=True, ge=0, le=1 << 40, examples=[4])]

Vcpus = Annotated[int, Field(strict=True, ge=1, le=1024, examples=[2])]
BalloonMib = Annotated[int, Field(strict=True, ge=0, le=16 << 20, examples=[512])]
MemoryMib = Annotated[int, Field(strict=True, ge=16, le=16 << 20, examples=[2048])]
DiskBytes = Annotated[int, Field(strict=True, ge=1 << 20, le=64 * TIB, multiple_of=512, examples=[10 << 30])]
Quota = Annotated[int, Field(strict=True, ge=0, le=INT_MAX, examples=[100])]
TimeoutS = Annotated[int, Field(strict=True, ge=1, le=7 * 86400, examples=[60])]
Bool = StrictBool

# '' for none. Names within a project; members make the group.
StartGroupOrNone = Annotated[str, Field(pattern=r"^([a-z]([a-z0-9-]{0,61}[a-z0-9])?)?$", max_length=63, examples=["shop"])]
StartOrder = Annotated[int, Field(strict=True, ge=0, le=1000, examples=[2])]
# These may be '', which is the same as left out. Not a union with "": pydantic's refusal of a union names no one field.
RefOrNone = Annotated[str, _text(f"({HOST_NAME_PATTERN})|^$", "default")]
Mac = Annotated[str, Field(pattern=r"^(([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2})?$", examples=["52:54:00:12:34:56"])]
Address = Annotated[str, Field(pattern=r"^([0-9A-Fa-f:.]{2,45}(/[0-9]{1,3})?)?$", examples=["10.0.0.5"])]
Subnet = Annotated[str, Field(pattern=r"^([0-9A-Fa-f:.]{2,45}/[0-9]{1,3})?$", examples=["10.20.0.0/24"])]
Subnet6 = Annotated[str, Field(pattern=r"^([0-9A-Fa-f:.]{2,45}/[0-9]{1,3})?$", examples=["fd00:20::/64"])]
BridgeOrNone = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,14})?$", examples=["br0"])]
RouterOrNone = Annotated[str, Field(pattern=r"^([a-z]([a-z0-9-]{0,38}[a-z0-9])?)?$", examples=["inner"])]
RouterName = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$", examples=["edge"])]
Address4 = Annotated[str, Field(pattern=r"^[0-9]{1,3}(\.[0-9]{1,3}){3}$", examples=["192.0.2.1"])]
BareAddress = Annotated[str, Field(pattern=r"^[0-9A-Fa-f:.]{2,45}$", examples=["192.0.2.53"])]
AddressOrNone = Annotated[str, Field(pattern=r"^([0-9A-Fa-f:.]{2,45})?$", examples=["192.0.2.1"])]
NicRefOrNone = Annotated[str, Field(pattern=r"^[0-9A-Za-z:-]{0,63}$", examples=["0"])]
CpuModelOrNone = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._+-]{0,79})?$", examples=["Skylake-Server-v4"])]
CpuClassOrNone = Annotated[str, Field(pattern=r"^(low|normal|high)?$", examples=["low"])]
CpuClassName = Annotated[str, Field(pattern=r"^(low|normal|high)$", examples=["low"])]
OsOrNone = Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9._-]{0,63})?$", examples=["win11"])]
BridgeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$", examples=["br0"])]
SHA256_EXAMPLE = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", examples=[SHA256_EXAMPLE])]
CpuModel = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,79}$", examples=["Skylake-Server-v4"])]
# '' for a pool without one.
PoolPath = Annotated[
    str, Field(pattern=r"^((/[A-Za-z0-9_][A-Za-z0-9._-]*)+)?$", max_length=500, examples=["/var/lib/trimtab/pools/fast"])
]


def _as_uuid(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return str(uuid.UUID(value))
    except ValueError:
        raise PydanticCustomError("uuid", "a UUID is expected") from None


RequestId = Annotated[
    str,
    BeforeValidator(_as_uuid),
    Field(max_length=36, examples=["0b8f5c0e-6d2f-4b42-9a3e-7f1f3c1f9a11"], json_schema_extra={"format": "uuid"}),
]


class Part(BaseModel):
    """A piece of a body: unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Body(Part):
    """A request body. `request_id` makes a repeat safe, as the header `Idempotency-Key` does."""

    request_id: RequestId | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, document: Any) -> Any:
        """Refuse what no database can store: NUL and half of a surrogate pair."""
        path = _bad_text(document, "")
        if path is not None:
            raise PydanticCustomError("text", "{field}: text with a NUL or half of a surrogate pair", {"field": path or "body"})
        return document


def _bad_text(value: Any, path: str) -> str | None:
    if isinstance(value, str):
        return path if is_bad_text(value) else None
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        items = [(f"{path}.{key}" if path else str(key), one) for key, one in value.items()]
        if any(isinstance(key, str) and is_bad_text(key) for key in value):
            return path
    elif isinstance(value, list):
        items = [(f"{path}[{i}]", one) for i, one in enumerate(value)]
    for below, one in items:
        found = _bad_text(one, below)
        if found is not None:
            return found
    return None


def is_bad_text(text: str) -> bool:
    return "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text)

"""Values as users type them: sizes, durations, labels. Each refusal names the bound and an example."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    ValueType = click.ParamType[Any]
else:
    ValueType = click.ParamType  # generic from click 8.5 on only

_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[a-zA-Z]*)")
_UNITS: Mapping[str, int] = {
    "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_DURATION = re.compile(r"(?:(?P<d>[0-9]+)d)?(?:(?P<h>[0-9]+)h)?(?:(?P<m>[0-9]+)m)?(?:(?P<s>[0-9]+)s)?")
_MIB = 1 << 20
_LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")


class SizeType(ValueType):
    """A size with its unit, as bytes or as whole MiB. A bare number is refused: bytes to one, MiB to the next."""

    name = "size"

    def __init__(self, *, in_mib: bool, minimum: str, maximum: str, example: str, is_zero_allowed: bool = False) -> None:
        self._in_mib = in_mib
        self._is_zero_allowed = is_zero_allowed
        self._minimum, self._maximum = _bytes_of(minimum), _bytes_of(maximum)
        self._bounds = f"give a size from {minimum} to {maximum}, for example {example}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip()
        match = _SIZE.fullmatch(text)
        if match is None:
            self.fail(f"{text!r} is not a size; {self._bounds}", param, ctx)
        if not match["unit"] and not (self._is_zero_allowed and float(match["number"]) == 0):
            self.fail(f"{text!r} has no unit; {self._bounds}", param, ctx)
        if match["unit"] and match["unit"].lower() not in _UNITS:
            self.fail(f"{text!r}: {match['unit']!r} is no unit of size; {self._bounds}", param, ctx)
        size_bytes = _bytes_of(text)
        if size_bytes == 0 and self._is_zero_allowed:
            return 0
        if not self._minimum <= size_bytes <= self._maximum:
            self.fail(f"{text!r} is out of bounds; {self._bounds}", param, ctx)
        if not self._in_mib:
            return size_bytes
        if size_bytes % _MIB:
            self.fail(f"{text!r} is not a whole number of MiB; {self._bounds}", param, ctx)
        return size_bytes // _MIB


class DurationType(ValueType):
    """A duration in whole seconds: `30s`, `5m`, `1h30m`, `90d`."""

    name = "duration"

    def __init__(self, *, maximum: str, example: str, minimum: str = "1s") -> None:
        self._minimum_s, self._maximum_s = _seconds_of(minimum), _seconds_of(maximum)
        self._bounds = f"give a duration from {minimum} to {maximum}, for example {example}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        seconds = _seconds_of(text)
        if seconds < 0:
            why = "has no unit" if text.isdigit() else "is not a duration"
            self.fail(f"{text!r} {why}; {self._bounds}", param, ctx)
        if not self._minimum_s <= seconds <= self._maximum_s:
            self.fail(f"{text!r} is out of bounds; {self._bounds}", param, ctx)
        return seconds


class MomentType(ValueType):
    """A moment as RFC 3339 text: given as such, or as an age such as `2h`."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip()
        seconds = _seconds_of(text.lower())
        if seconds >= 0:
            return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            self.fail(f"{text!r} is neither an age nor a moment; for example 2h or 2026-11-20T02:00Z", param, ctx)
        return (moment if moment.tzinfo else moment.astimezone()).isoformat()


class PairType(ValueType):
    """`key=value`, as a pair."""

    name = "key=value"

    def __init__(self, example: str, *, is_label: bool = True) -> None:
        self._example = example
        self._is_label = is_label

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return (str(value[0]), str(value[1]))
        key, separator, rest = str(value).partition("=")
        if not separator or not key:
            self.fail(f"{value!r} is not key=value, for example {self._example}", param, ctx)
        if self._is_label and not _LABEL_KEY.fullmatch(key):
            self.fail(
                f"the key {key!r} must be 1 to 63 of letters, digits, '.', '_', '-' and '/', as in {self._example}", param, ctx
            )
        return key, rest


@dataclass(frozen=True, slots=True)
class HostSize:
    cpu_millis: int
    memory_mib: int


class HostSizeType(ValueType):
    """`64c/256GiB`: the size of a host."""

    name = "cpus/memory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> HostSize:
        if isinstance(value, HostSize):
            return value
        cpus, separator, memory = str(value).partition("/")
        count = cpus.removesuffix("c")
        if not separator or not count.isdigit() or not cpus.endswith("c") or not 1 <= int(count) <= 4096:
            self.fail(f"{value!r} is not the size of a host: give 1 to 4096 cpus and memory, as in 64c/256GiB", param, ctx)
        of_memory = SizeType(in_mib=True, minimum="16MiB", maximum="64TiB", example="64c/256GiB")
        return HostSize(int(count) * 1000, of_memory.convert(memory, param, ctx))


@dataclass(frozen=True, slots=True)
class NicWish:
    network: str
    mac: str = ""
    ip: str = ""
    allows_spoofing: bool = False

    def as_json(self) -> dict[str, Any]:
        given = {"network": self.network, "mac": self.mac, "ip": self.ip, "allow_spoofing": self.allows_spoofing}
        return {key: value for key, value in given.items() if value}


class NicType(ValueType):
    """`NETWORK[,mac=52:54:00:12:34:56][,ip=10.0.0.5][,allow-spoofing]`."""

    name = "network[,mac=..][,ip=..][,allow-spoofing]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> NicWish:
        if isinstance(value, NicWish):
            return value
        network, *rest = str(value).split(",")
        example = "front,mac=52:54:00:12:34:56,ip=10.0.0.5"
        if not network or "=" in network:
            self.fail(f"{value!r} must start with the network's name, for example {example}", param, ctx)
        given: dict[str, str] = {}
        allows_spoofing = "allow-spoofing" in rest
        for part in rest:
            if part == "allow-spoofing":
                continue
            key, separator, content = part.partition("=")
            if key not in {"mac", "ip"} or not separator or not content:
                self.fail(f"{part!r} is not mac=… or ip=…, for example {example}", param, ctx)
            if key in given:
                self.fail(f"{key} is given twice, for example {example}", param, ctx)
            given[key] = content
        return NicWish(network, mac=given.get("mac", ""), ip=given.get("ip", ""), allows_spoofing=allows_spoofing)


class ColumnsType(ValueType):
    """`a,b,c`."""

    name = "a,b,c"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(",") if name.strip())
        if not names:
            self.fail("give column names, for example name,host", param, ctx)
        return names


class PairsType(PairType):
    """`a=1,b=2`, as pairs."""

    name = "key=value,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        convert = super().convert
        return tuple(convert(part, param, ctx) for part in str(value).split(","))


def _bytes_of(text: str) -> int:
    match = _SIZE.fullmatch(text)
    assert match is not None
    # Whole numbers stay whole: a float has only 53 bits.
    number = match["number"]
    unit = _UNITS.get(match["unit"].lower(), 1)
    return round(float(number) * unit) if "." in number else int(number) * unit


def _seconds_of(text: str) -> int:
    """Return whole seconds, -1 for what is no duration."""
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        return -1
    days, hours, minutes, seconds = (int(match[unit] or 0) for unit in "dhms")
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


DISK_SIZE = SizeType(in_mib=False, minimum="1MiB", maximum="64TiB", example="20GiB")
DISK_QUOTA = SizeType(in_mib=False, minimum="1MiB", maximum="1048576TiB", example="2TiB", is_zero_allowed=True)
MEMORY = SizeType(in_mib=True, minimum="16MiB", maximum="16TiB", example="2GiB")
BALLOON = SizeType(in_mib=True, minimum="16MiB", maximum="16TiB", example="512MiB", is_zero_allowed=True)
MEMORY_AMOUNT = SizeType(in_mib=True, minimum="1MiB", maximum="1048576TiB", example="512GiB", is_zero_allowed=True)

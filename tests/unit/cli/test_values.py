"""Sizes, durations and ages: as they are typed and as they are shown."""

from datetime import UTC, datetime, timedelta

import click
import pytest

from trimtab_controller.cli import humanise, render
from trimtab_controller.cli.values import DISK_QUOTA, DISK_SIZE, MEMORY, DurationType, MomentType

NOW = datetime(2026, 11, 20, 2, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "size_mib"),
    [("96MiB", 96), ("2GiB", 2048), ("2g", 2048), ("1.5 GiB", 1536), ("1t", 1 << 20), ("65536KiB", 64), ("1048576MB", 1_000_000)],
)
def test_memory_is_whole_mib(text: str, size_mib: int) -> None:
    assert MEMORY.convert(text, None, None) == size_mib


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("40G", 40 << 30), ("20GiB", 20 << 30), ("1MiB", 1 << 20), ("64TiB", 64 << 40), ("20GB", 20_000_000_000)],
)
def test_disks_are_bytes(text: str, size_bytes: int) -> None:
    assert DISK_SIZE.convert(text, None, None) == size_bytes


def test_large_sizes_are_exact() -> None:
    assert DISK_QUOTA.convert(f"{(1 << 53) // 1024 - 1}KiB", None, None) == (1 << 53) - 1024
    assert DISK_QUOTA.convert("0", None, None) == 0


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("5m", 300), ("1h30m", 5400), ("2d", 172_800), ("1d2h3m4s", 93_784)])
def test_durations_are_seconds(text: str, seconds: int) -> None:
    assert DurationType(maximum="7d", example="10m").convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "30", "s", "5 m", "1m1h", "-5s", "1.5h", "8d"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="from 1s to 7d, for example 10m"):
        DurationType(maximum="7d", example="10m").convert(text, None, None)


def test_moments_have_a_time_zone() -> None:
    age = datetime.fromisoformat(MomentType().convert("2h", None, None))
    assert abs(datetime.now(UTC) - timedelta(hours=2) - age) < timedelta(minutes=1)
    assert datetime.fromisoformat(MomentType().convert("2026-11-20T02:00", None, None)).tzinfo is not None


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(None, ""), (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (20 << 30, "20 GiB"), (1 << 62, "4096 PiB")],
)
def test_sizes_are_shown_short(size_bytes: int | None, shown: str) -> None:
    assert humanise.size(size_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59.4, "59s"), (60, "1m"), (130, "2m 10s"), (7200, "2h"), (18_130, "5h 2m"), (273_600, "3d 4h")],
)
def test_durations_are_shown_short(seconds: float, shown: str) -> None:
    assert humanise.duration(seconds) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2026-11-20T01:59:57Z", "3s ago"),
        ("2026-11-19T20:00:00+00:00", "6h ago"),
        ("2026-11-20T02:14:00Z", "in 14m"),
        (None, ""),
        ("never", ""),
    ],
)
def test_moments_are_shown_as_ages(text: str | None, shown: str) -> None:
    assert humanise.since(text, NOW) == shown


@pytest.mark.parametrize(
    ("used", "limit", "shown"),
    [(0, 10, "░░░░   0%"), (5, 10, "██░░  50%"), (15, 10, "████ 150%"), (1, 0, "░░░░   0%")],
)
def test_bars_show_emptiness_and_overcommitment(used: int, limit: int, shown: str) -> None:
    assert humanise.bar(used, limit, width=4) == shown


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a.b", 1),
        ("a.c", None),
        ("list.1.x", 2),
        ("list.7.x", None),
        ("dotted.key", 3),
        ("a", {"b": 1}),
        ("a.b.c", None),
        ("", None),
    ],
)
def test_paths_lead_into_documents(path: str, value: object) -> None:
    document = {"a": {"b": 1}, "list": [{}, {"x": 2}], "dotted.key": 3}
    assert render.at(document, path) == (value if path else document)

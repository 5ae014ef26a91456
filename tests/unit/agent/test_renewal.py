"""Renewal at half life and for a changed CA, over the real gateway, without a restart."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio

from tests.unit.agent.factories import host_credentials, new_fleet_authority
from tests.unit.agent.gateway_double import GatewayDouble
from tests.unit.agent.waiting import until
from trimtab_agent.certificates import FixedCredentials
from trimtab_agent.renewal import Renewal
from trimtab_protos.errors import Unavailable


class World:
    def __init__(self) -> None:
        self.authority = new_fleet_authority()
        self.gateway = GatewayDouble(self.authority)
        self.credentials = FixedCredentials(host_credentials(self.authority, "host-1"))
        self.now = datetime.now(UTC)
        self.libvirt: bytes | None = None
        self.installed: list[tuple[bytes, bytes, bytes]] = []
        self.renewals = 0
        self.gateways: list[str] = []
        self.renewal = Renewal(
            self.credentials,
            gateways=lambda: self.gateways,
            libvirt_certificate=lambda: self.libvirt,
            install_libvirt=self._install,
            on_renewed=self._on_renewed,
            now=lambda: self.now,
        )

    def _install(self, ca_pem: bytes, certificate_pem: bytes, key_pem: bytes) -> None:
        self.installed.append((ca_pem, certificate_pem, key_pem))
        self.libvirt = certificate_pem

    def _on_renewed(self) -> None:
        self.renewals += 1


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.gateway.start()
    world.gateways = [world.gateway.address]
    yield world
    await world.gateway.stop()


async def test_a_young_certificate_is_left_alone(world: World) -> None:
    assert not world.renewal.is_due()


async def test_at_half_life_both_pairs_are_renewed_with_new_keys(world: World) -> None:
    before = world.credentials.current()
    world.now += timedelta(minutes=40)
    assert world.renewal.is_due()
    await world.renewal.renew()
    after = world.credentials.current()
    assert after.key_pem != before.key_pem
    assert after.certificate().serial_number != before.certificate().serial_number
    ((ca_pem, certificate_pem, key_pem),) = world.installed
    assert (ca_pem, b"PRIVATE KEY" in key_pem, b"CERTIFICATE" in certificate_pem) == (after.ca_pem, True, True)
    assert world.renewals == 1


async def test_a_short_life_is_looked_at_often_enough_and_is_not_half_over_when_it_begins(world: World) -> None:
    world.credentials.replace(host_credentials(world.authority, "host-1", life=timedelta(seconds=24)))
    assert not world.renewal.is_due()
    running = asyncio.create_task(world.renewal.run())
    world.now += timedelta(seconds=14)
    await until(lambda: world.renewals == 1, what="the renewal")
    running.cancel()


async def test_an_old_libvirt_certificate_alone_is_reason_enough(world: World) -> None:
    world.libvirt = host_credentials(world.authority, "host-1", life=timedelta(seconds=30)).certificate_pem
    assert not world.renewal.is_due()
    world.now += timedelta(seconds=16)
    assert world.renewal.is_due()


async def test_a_changed_ca_bundle_is_reason_to_renew_at_once_but_not_for_ever(world: World) -> None:
    running = asyncio.create_task(world.renewal.run())
    world.renewal.bundle_told("0" * 64)  # a gateway whose bundle the renewal does not bring
    await until(lambda: world.renewals == 1, what="the renewal")
    world.renewal.bundle_told("0" * 64)
    assert not world.renewal.is_due()
    world.now += timedelta(minutes=6)
    assert world.renewal.is_due()
    world.renewal.bundle_told(world.credentials.current().ca_bundle_sha256)
    assert not world.renewal.is_due()
    running.cancel()


async def test_the_first_gateway_that_answers_renews(world: World) -> None:
    world.gateways = ["127.0.0.1:1", world.gateway.address]
    await world.renewal.renew()
    assert world.renewals == 1


async def test_without_a_gateway_the_old_certificate_stays(world: World) -> None:
    before = world.credentials.current()
    world.gateways = ["127.0.0.1:1"]
    with pytest.raises(Unavailable):
        await world.renewal.renew()
    assert world.credentials.current() == before
    assert world.installed == []

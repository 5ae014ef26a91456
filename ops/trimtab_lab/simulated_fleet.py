"""The process behind `trimtab-lab up --simulated N`: N agents on simulated hosts, joined to a control plane as real ones are.

    token (REST) ─► Join (gRPC, one-use token, certificate request) ─► identity kept ─► agent served, session held

What a simulated host leaves out: its libvirt key is everybody's (an RSA key takes a tenth of a second to make, and nothing here
speaks libvirt), and the machine is not changed. Guests live in this process and end with it; identities and the agents' journal
are kept, so that a restart is a reboot of the whole fleet.
"""

import argparse
import asyncio
import http.client
import json
import os
import resource
import signal
import ssl
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import structlog

from trimtab_agent import log
from trimtab_agent.agent import Agent
from trimtab_agent.certificates import KeyRequest, new_agent_request, new_libvirt_request
from trimtab_agent.hypervisor.simulated import SimulatedHost
from trimtab_agent.hypervisor.simulation import SimulatedFleet
from trimtab_agent.journal import JournalFile
from trimtab_agent.simulated_agents import SharedResources, start_simulated_agent
from trimtab_agent.version import agent_version
from trimtab_lab.commands import write_atomically
from trimtab_lab.errors import LabError
from trimtab_protos import status, tls
from trimtab_protos.controller.v1 import join_service_pb2 as pb
from trimtab_protos.controller.v1.join_service_pb2_grpc import JoinServiceStub

logger = structlog.get_logger(__name__)

JOINS_AT_ONCE = 4
"""As many as the controller signs at a time."""
STARTS_AT_ONCE = 16
CALL_TIMEOUT_S = 30.0
STATUS_EVERY_S = 0.25
STOP_TIMEOUT_S = 5.0
MACHINE_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_OID, "trimtab simulated machines")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """What one fleet process is told."""

    directory: Path
    """Holds `hosts.jsonl`, `journal.db` and `status.json`."""
    controller_directory: Path
    url: str
    count: int
    address_prefix: str
    """`127.80`: host i listens on `127.80.x.y`, an address of its own as real hosts have."""
    agent_port: int


@dataclass(frozen=True, slots=True)
class Member:
    """A host that joined."""

    name: str
    host_id: str
    address: str
    certificate_pem: str
    key_pem: str
    ca_pem: str
    gateways: tuple[str, ...]

    def credentials(self) -> tls.Credentials:
        return tls.Credentials(self.ca_pem.encode(), self.certificate_pem.encode(), self.key_pem.encode())


class Joining:
    """Makes members: the real token, the real Join call. Its methods are called from several threads, with a token maker each."""

    def __init__(self, options: FleetOptions) -> None:
        self._options = options
        self._ca_path = options.controller_directory / "pki" / "ca.pem"
        self._libvirt: KeyRequest = new_libvirt_request()
        with _api(options, self._ca_path) as api:
            document = _ask(api, "GET", "/v1/join", {}, token="")
        self._token = (options.controller_directory / "admin.token").read_text().strip()
        credentials = grpc.ssl_channel_credentials(self._ca_path.read_bytes())
        self._channel = grpc.secure_channel(
            document["join_addresses"][0], credentials, options=tls.channel_options(tls.CONTROLLER_NAME, is_own_connection=True)
        )

    def close(self) -> None:
        self._channel.close()

    def join_all(self, numbers: Sequence[int]) -> Iterator[Member]:
        """Join these hosts, several at once; yields each as it is taken in."""
        with ThreadPoolExecutor(JOINS_AT_ONCE, thread_name_prefix="join") as threads:
            shares = [numbers[first::JOINS_AT_ONCE] for first in range(JOINS_AT_ONCE)]
            for members in threads.map(self._join_share, shares):
                yield from members

    def _join_share(self, numbers: Sequence[int]) -> list[Member]:
        with _api(self._options, self._ca_path) as api:
            return [self._join(api, number) for number in numbers]

    def _join(self, api: http.client.HTTPSConnection, number: int) -> Member:
        name, address = f"sim{number:05}", address_of(self._options, number)
        token = _ask(api, "POST", "/v1/host-tokens", {"name": name}, token=self._token)["token"]
        agent = new_agent_request()
        machine = uuid.uuid5(MACHINE_NAMESPACE, f"{self._options.directory} {name}")
        request = pb.JoinRequest(
            token=token,
            facts=pb.HostFacts(
                name=name,
                machine_id=machine.hex,
                smbios_uuid=str(machine),
                agent_version=agent_version(),
                agent_address=f"{address}:{self._options.agent_port}",
                migration_address=address,
                sent_unix_ms=time.time_ns() // 1_000_000,
            ),
            agent_csr_pem=agent.csr_pem,
            libvirt_csr_pem=self._libvirt.csr_pem,
        )
        try:
            answer = JoinServiceStub(self._channel).Join(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise status.from_rpc_error(error, peer="the controller") from error
        return Member(
            name=name,
            host_id=answer.host_id,
            address=address,
            certificate_pem=answer.agent_certificate_pem,
            key_pem=agent.key_pem.decode(),
            ca_pem=answer.ca_bundle_pem,
            gateways=tuple(answer.gateway_addresses),
        )


def address_of(options: FleetOptions, number: int) -> str:
    return f"{options.address_prefix}.{number >> 8}.{number & 255}"

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
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
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
from trimtab_agent.simulated_agents import SharedResources, inline_pools, start_simulated_agent
from trimtab_agent.version import agent_version
from trimtab_agent.workers import InlinePool
from trimtab_lab.commands import write_atomically
from trimtab_lab.errors import LabError
from trimtab_protos import status, tls
from trimtab_protos.controller.v1 import join_service_pb2 as pb
from trimtab_protos.controller.v1.join_service_pb2_grpc import JoinServiceStub

logger = structlog.get_logger(__name__)

JOINS_AT_ONCE = 2
"""Half of what the controller takes at a time: there a call counts for a moment longer than here, and one too many is refused."""
JOIN_TRIES = 6
JOIN_PAUSE_S = 0.05
STARTS_AT_ONCE = 16
CALL_TIMEOUT_S = 30.0
STATUS_EVERY_S = 0.25
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A host that joined."""

    number: int
    host_id: str
    certificate_pem: str
    key_pem: str
    ca_pem: str
    gateways: tuple[str, ...]

    def credentials(self) -> tls.Credentials:
        return tls.Credentials(self.ca_pem.encode(), self.certificate_pem.encode(), self.key_pem.encode())


class Joining:
    """Makes members with a real token and a real Join call each. Thread-safe."""

    def __init__(self, options: FleetOptions) -> None:
        self._options = options
        ca_path = options.controller_directory / "pki" / "ca.pem"
        self._admin_token = (options.controller_directory / "admin.token").read_text().strip()
        self._libvirt: KeyRequest = new_libvirt_request()
        self._apis: SimpleQueue[http.client.HTTPSConnection] = SimpleQueue()
        context = ssl.create_default_context(cafile=str(ca_path))
        for _ in range(JOINS_AT_ONCE):
            self._apis.put(http.client.HTTPSConnection(urlsplit(options.url).netloc, context=context, timeout=CALL_TIMEOUT_S))
        self._channel = grpc.secure_channel(
            self._ask("GET", "/v1/join")["join_addresses"][0],
            grpc.ssl_channel_credentials(ca_path.read_bytes()),
            options=tls.channel_options(tls.CONTROLLER_NAME, is_own_connection=True),
        )

    def join(self, number: int) -> Member:
        name, address = name_of(number), address_of(self._options, number)
        token = self._ask("POST", "/v1/host-tokens", {"name": name})["token"]
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
        answer = self._send(request)
        return Member(
            number=number,
            host_id=answer.host_id,
            certificate_pem=answer.agent_certificate_pem,
            key_pem=agent.key_pem.decode(),
            ca_pem=answer.ca_bundle_pem,
            gateways=tuple(answer.gateway_addresses),
        )

    def _send(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Join; a call that the server refused or never saw is sent again, as a person would paste the line again."""
        for left in reversed(range(JOIN_TRIES)):
            try:
                return JoinServiceStub(self._channel).Join(request, timeout=CALL_TIMEOUT_S)
            except grpc.RpcError as failed:
                error = status.from_rpc_error(failed, peer="the controller")
                if not left or not error.retryable:
                    raise error from failed
                time.sleep(JOIN_PAUSE_S)
        raise AssertionError("unreachable")

    def close(self) -> None:
        self._channel.close()
        while not self._apis.empty():
            self._apis.get().close()

    def _ask(self, method: str, path: str, body: dict[str, str] | None = None) -> dict[str, Any]:
        api = self._apis.get()
        try:
            headers = {"Authorization": f"Bearer {self._admin_token}", "Content-Type": "application/json"}
            api.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = api.getresponse()
            content = answer.read()
        finally:
            self._apis.put(api)
        if answer.status >= 300:
            raise LabError(f"{method} {path} answered {answer.status}: {content.decode(errors='replace')[:300]}")
        document: dict[str, Any] = json.loads(content)
        return document


class MemberFile:
    """The identities, one JSON line each, appended as hosts join."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[int, Member]:
        if not self._path.exists():
            return {}
        documents = [json.loads(line) for line in self._path.read_text().splitlines()]
        members = [Member(**{**one, "gateways": tuple(one["gateways"])}) for one in documents]
        return {member.number: member for member in members}

    def add(self, member: Member) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(asdict(member)) + "\n")


class FleetProcess:
    """Joins who is missing, serves everybody, tells how far it is."""

    def __init__(self, options: FleetOptions) -> None:
        self._options = options
        self._members = MemberFile(options.directory / "hosts.jsonl")
        self._fleet = SimulatedFleet()
        self._resources = SharedResources(
            journal=JournalFile(options.directory / "journal.db"), pools=inline_pools(), watch=InlinePool("watch")
        )
        self._agents: list[Agent] = []
        self._starting = asyncio.Semaphore(STARTS_AT_ONCE)

    async def run(self, stopping: asyncio.Event) -> None:
        """Serve until `stopping` is set. What goes wrong with one host ends it: half a fleet measures nothing."""
        reporting = asyncio.create_task(self._report())
        try:
            bringing = asyncio.create_task(self._bring_all())
            waiting = asyncio.create_task(stopping.wait())
            await asyncio.wait({bringing, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if bringing.done():
                bringing.result()
                await waiting
            bringing.cancel()
        finally:
            reporting.cancel()
            self._resources.journal.close()
            self._fleet.close()

    async def _bring_all(self) -> None:
        known = self._members.read()
        missing = [number for number in range(1, self._options.count + 1) if number not in known]
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(JOINS_AT_ONCE, thread_name_prefix="join") as threads:
            joining = await loop.run_in_executor(threads, Joining, self._options) if missing else None

            async def join_and_start(number: int) -> None:
                assert joining is not None
                member = await loop.run_in_executor(threads, joining.join, number)
                self._members.add(member)
                await self._start(member)

            async with asyncio.TaskGroup() as group:
                for member in known.values():
                    group.create_task(self._start(member))
                for number in missing:
                    group.create_task(join_and_start(number))
            if joining is not None:
                joining.close()
        logger.info("fleet serves", hosts=len(self._agents))

    async def _start(self, member: Member) -> None:
        address = address_of(self._options, member.number)
        async with self._starting:
            host = SimulatedHost(host_id=member.host_id, hostname=name_of(member.number), migration_address=address)
            agent = await start_simulated_agent(
                self._fleet,
                host,
                resources=self._resources,
                credentials=member.credentials(),
                listen_address=f"{address}:{self._options.agent_port}",
                gateways=member.gateways,
            )
        self._agents.append(agent)

    async def _report(self) -> None:
        path = self._options.directory / "status.json"
        while True:
            sessions = sum(1 for agent in self._agents if agent.session is not None and agent.session.gateway)
            figures = {"count": self._options.count, "agents": len(self._agents), "sessions": sessions}
            await asyncio.to_thread(write_atomically, path, json.dumps(figures))
            await asyncio.sleep(STATUS_EVERY_S)


def name_of(number: int) -> str:
    return f"sim{number:05}"


def address_of(options: FleetOptions, number: int) -> str:
    return f"{options.address_prefix}.{number >> 8}.{number & 255}"


async def serve(options: FleetOptions) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await FleetProcess(options).run(stopping)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("directory", Path), ("controller-directory", Path), ("url", str), ("count", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--address-prefix", default="127.80")
    parser.add_argument("--agent-port", type=int, required=True)
    options = FleetOptions(**vars(parser.parse_args()))
    log.configure("simulated-fleet", level="warning")
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a listener, a session and the controller's channel per host
    asyncio.run(serve(options))
    sys.stderr.flush()
    # A thousand listeners end like machines that lose power; to close them one by one would take longer than anybody waits.
    os._exit(0)


if __name__ == "__main__":
    main()

"""Renews the host's certificates at half of their life, or when the fleet's CA changes; nothing is restarted and nobody disturbed.

The agent's server asks for its credentials at each connection; the session is opened anew over the new certificate; libvirtd is told
to load its own again. When the controller cannot be reached the old ones go on until they end: half a life is left for trying.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import grpc
import structlog

from trimtab_agent.certificates import (
    CredentialSource,
    KeyRequest,
    is_past_half_life,
    life_s,
    new_agent_request,
    new_libvirt_request,
)
from trimtab_protos import status, tls
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb
from trimtab_protos.controller.v1.gateway_service_pb2_grpc import GatewayServiceStub
from trimtab_protos.errors import Internal, TrimtabError, Unavailable

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 60.0
LOOKS_PER_LIFE = 12
"""At least so often in a life, where that is short: half of it is left for trying."""
CALL_TIMEOUT_S = 20.0
CA_RETRY_S = 300.0
"""After a renewal for a changed CA, not again so soon: a gateway whose own bundle lags would keep the host renewing."""

InstallLibvirt = Callable[[bytes, bytes, bytes], None]
"""Gets CA, certificate and key and puts them into force; blocks."""


class Renewal:
    """The renewals of one host; lives on one event loop."""

    def __init__(
        self,
        credentials: CredentialSource,
        *,
        gateways: Callable[[], Sequence[str]],
        libvirt_certificate: Callable[[], bytes | None],
        install_libvirt: InstallLibvirt,
        on_renewed: Callable[[], None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`on_renewed` is called on the event loop after both pairs are in force."""
        self._credentials = credentials
        self._gateways = gateways
        self._libvirt_certificate = libvirt_certificate
        self._install_libvirt = install_libvirt
        self._on_renewed = on_renewed
        self._now = now
        self._told_bundle = ""
        self._bundle_tried_at: datetime | None = None
        self._wake = asyncio.Event()

    def bundle_told(self, sha256: str) -> None:
        """Take note of the CA bundle in force, from a Welcome."""
        self._told_bundle = sha256
        if self._is_bundle_other():
            self._wake.set()

    async def run(self) -> None:
        """Renew when due, for ever."""
        while True:
            self._wake.clear()
            if self.is_due():
                try:
                    await self.renew()
                except TrimtabError as error:
                    log.warning("certificates not renewed", code=error.code, message=error.message)
            try:
                async with asyncio.timeout(self._pause_s() * random.uniform(0.8, 1.2)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _pause_s(self) -> float:
        return min(LOOK_EVERY_S, life_s(self._credentials.current().certificate_pem) / LOOKS_PER_LIFE)

    def is_due(self) -> bool:
        now = self._now()
        if is_past_half_life(self._credentials.current().certificate_pem, now=now):
            return True
        libvirt = self._libvirt_certificate()
        if libvirt is not None and is_past_half_life(libvirt, now=now):
            return True
        if not self._is_bundle_other():
            return False
        return self._bundle_tried_at is None or (now - self._bundle_tried_at).total_seconds() >= CA_RETRY_S

    async def renew(self) -> None:
        """Renew both pairs now. Raises Unavailable where no gateway answers."""
        if self._is_bundle_other():
            self._bundle_tried_at = self._now()
        agent, libvirt = await asyncio.to_thread(lambda: (new_agent_request(), new_libvirt_request()))
        request = pb.RenewCertificatesRequest(agent_csr_pem=agent.csr_pem, libvirt_csr_pem=libvirt.csr_pem)
        answer = await self._ask(request)
        await asyncio.to_thread(self._install, answer, agent, libvirt)
        log.info("certificates renewed", not_after=str(self._credentials.current().certificate().not_valid_after_utc))
        self._on_renewed()

    def _is_bundle_other(self) -> bool:
        return bool(self._told_bundle) and self._told_bundle != self._credentials.current().ca_bundle_sha256

    def _install(self, answer: pb.RenewCertificatesResponse, agent: KeyRequest, libvirt: KeyRequest) -> None:
        ca_pem = answer.ca_bundle_pem.encode()
        renewed = tls.Credentials(ca_pem, answer.agent_certificate_pem.encode(), agent.key_pem)
        try:
            renewed.certificate()
        except ValueError as error:
            raise Internal("renewal-malformed", "the gateway answered with something that is no certificate") from error
        self._install_libvirt(ca_pem, answer.libvirt_certificate_pem.encode(), libvirt.key_pem)
        self._credentials.replace(renewed)

    async def _ask(self, request: pb.RenewCertificatesRequest) -> pb.RenewCertificatesResponse:
        failed: TrimtabError = Unavailable("no-gateways", "no gateway to ask for certificates")
        options = tls.channel_options(tls.CONTROLLER_NAME, is_own_connection=True)
        for address in self._gateways():
            credentials = self._credentials.current().for_channel()
            async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
                try:
                    return await GatewayServiceStub(channel).RenewCertificates(request, timeout=CALL_TIMEOUT_S)
                except grpc.aio.AioRpcError as error:
                    failed = status.from_rpc_error(error, peer=f"gateway {address}")
        raise failed

"""The JoinService: admits machines that have a token and no certificate yet. TLS proves the controller to them, the token them to us."""

import asyncio
from datetime import timedelta
from typing import Any

import grpc
import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock, mint
from trimtab_controller.config import Settings
from trimtab_controller.pki import FleetPki
from trimtab_controller.rpc.peers import typed_errors
from trimtab_controller.services import hosts
from trimtab_controller.services.hosts import HostFacts
from trimtab_controller.store.database import Database
from trimtab_protos.codec import from_proto
from trimtab_protos.controller.v1 import join_service_pb2 as pb
from trimtab_protos.controller.v1 import join_service_pb2_grpc as pb_grpc
from trimtab_protos.errors import InvalidRequest

log = structlog.get_logger(__name__)

FACT_MAX_CHARACTERS = 200
JOINS_AT_ONCE = 4
"""Signing is CPU work of strangers until their token is checked: it must not starve the heartbeats of members."""


class JoinServicer(pb_grpc.JoinServiceServicer):
    def __init__(self, settings: Settings, database: Database, clock: Clock, pki: FleetPki) -> None:
        self._settings = settings
        self._database = database
        self._clock = clock
        self._pki = pki
        self._slots = asyncio.Semaphore(JOINS_AT_ONCE)

    async def CheckJoin(
        self,
        request: pb.CheckJoinRequest,
        context: grpc.aio.ServicerContext[pb.CheckJoinRequest, pb.CheckJoinResponse],
    ) -> pb.CheckJoinResponse:
        async with typed_errors(context, "check join"), self._slots:
            response = await asyncio.to_thread(self._check, request)
        return response

    async def Join(
        self, request: pb.JoinRequest, context: grpc.aio.ServicerContext[pb.JoinRequest, pb.JoinResponse]
    ) -> pb.JoinResponse:
        def count(code: str) -> None:
            metrics.JOINS.labels(code).inc()
            log.info("join refused", peer=context.peer(), code=code)

        async with typed_errors(context, "join", count=count), self._slots:
            response = await asyncio.to_thread(self._join, request)
            metrics.JOINS.labels("joined").inc()
        return response

    def _check(self, request: pb.CheckJoinRequest) -> pb.CheckJoinResponse:
        facts, now = _facts(request.facts), self._clock.now()
        assessment = self._database.read(
            lambda session: hosts.assess(session, request.token, facts, now, skew_max_s=self._settings.clock_skew_max_s)
        )
        return pb.CheckJoinResponse(
            refusals=[refusal.message for refusal in assessment.refusals],
            controller_unix_ms=int(now.timestamp() * 1000),
        )

    def _join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        facts, now, skew_max_s = _facts(request.facts), self._clock.now(), self._settings.clock_skew_max_s
        assessment = self._database.read(lambda session: hosts.assess(session, request.token, facts, now, skew_max_s=skew_max_s))
        if assessment.refusals:
            self._database.write(lambda session: hosts.note_join(session, assessment, facts, now))
            raise assessment.refusals[0]
        host_id = assessment.returning.id if assessment.returning else mint("host")
        proven_serial = ""
        if facts.previous_host_id:
            proven_serial = hosts.verify_rejoin(
                self._pki.authorities_ever(),
                host_id,
                request.previous_certificate_pem,
                request.rejoin_proof,
                token=request.token,
                agent_csr_pem=request.agent_csr_pem,
            )
        signed = hosts.sign_pair(
            self._pki.signing(),
            host_id,
            agent_csr_pem=request.agent_csr_pem,
            libvirt_csr_pem=request.libvirt_csr_pem,
            migration_address=facts.migration_address,
            now=now,
            life=timedelta(hours=self._settings.agent_certificate_hours),
        )
        host = self._database.write(
            lambda session: hosts.admit(
                session,
                request.token,
                facts,
                signed,
                now,
                host_id=host_id,
                proven_serial=proven_serial,
                skew_max_s=skew_max_s,
            )
        )
        log.info("host joined", host_id=host.id, host=host.name, is_returning=assessment.returning is not None)
        return pb.JoinResponse(
            host_id=host.id,
            agent_certificate_pem=signed.agent.pem,
            libvirt_certificate_pem=signed.libvirt.pem,
            ca_bundle_pem=self._pki.bundle_pem(),
            gateway_addresses=self._settings.gateway_addresses,
        )


def _facts(message: pb.HostFacts) -> HostFacts:
    facts = from_proto(message, HostFacts)
    for field in ("name", "machine_id", "smbios_uuid", "agent_version", "agent_address", "migration_address"):
        if len(getattr(facts, field)) > FACT_MAX_CHARACTERS:
            raise InvalidRequest("host-fact-malformed", f"{field}: at most {FACT_MAX_CHARACTERS} characters", field=field)
    return facts


def add_to_server(servicer: JoinServicer, server: Any) -> None:
    pb_grpc.add_JoinServiceServicer_to_server(servicer, server)

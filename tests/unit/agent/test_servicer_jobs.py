"""The agent over gRPC: image imports and other jobs."""

import secrets

import grpc
import pytest

from tests.unit.agent.factories import (
    SHARED,
)
from tests.unit.agent.servicer_kit import TIMEOUT_S, Host, World, key, pool_message, refusal, wait_for_job
from trimtab_protos import status, tls
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.agent.v1 import command_pb2, storage_pb2
from trimtab_protos.agent.v1.agent_service_pb2_grpc import ReplicaServiceStub
from trimtab_protos.errors import (
    NotFound,
    PermissionDenied,
    Unavailable,
)

# --- jobs --------------------------------------------------------------------------------------------------------------------


def import_request(**given: object) -> pb.StartImageImportRequest:
    return pb.StartImageImportRequest(
        key=key(**{"step": "import", "subject_id": "img-1", "epoch": 0, **given}),
        image=storage_pb2.ImageSpec(
            image_id="img-1", pool_id=SHARED.pool_id, format=storage_pb2.DISK_FORMAT_QCOW2, max_bytes=1 << 30
        ),
        pool=pool_message(),
        host_file=storage_pb2.HostFileSource(file_name="guest.qcow2"),
    )


async def test_an_import_is_a_job_that_its_key_finds(host: Host) -> None:
    request = import_request()
    begun = await host.call("StartImageImport", request)
    assert isinstance(begun, pb.StartImageImportResponse)
    job = await wait_for_job(host, request.key)
    assert job.state == command_pb2.JOB_STATE_SUCCEEDED
    assert job.image.virtual_size_bytes == 1 << 30
    assert job.sequence > begun.job.sequence
    found = await host.call("StartImageImport", request)
    assert isinstance(found, pb.StartImageImportResponse)
    assert found.job == job
    listed = await host.call("ListJobs", pb.ListJobsRequest())
    assert isinstance(listed, pb.ListJobsResponse)
    assert list(listed.jobs) == [job]


async def test_an_unknown_job_is_not_found(host: Host) -> None:
    request = pb.GetJobRequest(operation_id="op-none", step="x", direction=command_pb2.DIRECTION_DO)
    assert isinstance(await refusal(host, "GetJob", request), NotFound)


async def test_an_image_is_copied_from_a_peer_with_a_ticket(world: World, host: Host) -> None:
    request = import_request()
    await host.call("StartImageImport", request)
    result = (await wait_for_job(host, request.key)).image
    ticket = secrets.token_hex(32)
    offer = pb.OfferImageRequest(
        key=key(subject_id="img-1", step="offer", epoch=0),
        image_id="img-1",
        pool=pool_message(),
        format=storage_pb2.DISK_FORMAT_QCOW2,
        ticket=ticket,
        ttl_s=60,
        peer_host_id="host-2",
    )
    answer = await host.call("OfferImage", offer)
    assert isinstance(answer, pb.OfferImageResponse)

    async def read(as_name: str, given: str, offset: int = 0) -> bytes:
        channel = world.channel(answer.address, as_name=as_name, to="host-1")
        try:
            blocks = ReplicaServiceStub(channel).ReadImage(
                pb.ReadImageRequest(image_id="img-1", ticket=given, offset=offset), timeout=TIMEOUT_S
            )
            return b"".join([block.content async for block in blocks])
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error, peer="host-1") from error
        finally:
            await channel.close()

    for as_name, given in (("host-3", ticket), ("host-2", secrets.token_hex(32))):
        with pytest.raises(Unavailable) as caught:
            await read(as_name, given)
        assert caught.value.code == "ticket-refused"
    with pytest.raises(PermissionDenied):
        await read(tls.CONTROLLER_NAME, ticket)
    content = await read("host-2", ticket)
    assert len(content) == result.file_size_bytes
    with pytest.raises(Unavailable):
        await read("host-2", ticket)
    # The command's repetition brings another ticket, as after the source's agent was started anew.
    offer.ticket = secrets.token_hex(32)
    await host.call("OfferImage", offer)
    assert await read("host-2", offer.ticket, offset=result.file_size_bytes - 5) == content[-5:]

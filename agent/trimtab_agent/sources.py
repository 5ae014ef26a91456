"""Where images come from, as the importer reads them: the controller's uploads, peers, https addresses, an operator's folder.

Readers only transport: the importer hashes, bounds and checks what they yield.
"""

import contextlib
import os
import random
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import assert_never

import grpc

from trimtab_agent.certificates import CredentialSource
from trimtab_agent.hypervisor.base import JobControl
from trimtab_agent.hypervisor.kvm.pool_layout import IMPORT, PoolLayout
from trimtab_agent.url_source import Resolver, read_url, resolve
from trimtab_protos import status, tls
from trimtab_protos.agent.v1 import agent_service_pb2
from trimtab_protos.agent.v1.agent_service_pb2_grpc import ReplicaServiceStub
from trimtab_protos.controller.v1 import gateway_service_pb2
from trimtab_protos.controller.v1.gateway_service_pb2_grpc import GatewayServiceStub
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound, TrimtabError, Unavailable
from trimtab_protos.messages import HostFileSource, ImageSource, PeerSource, PoolSpec, UploadSource, UrlSource, VolumeSource

BLOCK_BYTES = 1 << 20
STREAM_TIMEOUT_S = 6 * 3600.0
"""Bound of one transfer; a peer that went away is noticed by keepalive within 30 s."""
MAX_BREAKS = 5
"""How often a transfer goes on from where it broke, without a byte in between, before it fails."""
BREAK_PAUSE_S = 2.0


class Sources:
    """The agent's `SourceReader`. Thread-safe; every transfer has a channel of its own."""

    def __init__(
        self,
        credentials: CredentialSource,
        *,
        gateways: Callable[[], Sequence[str]],
        pause: Callable[[float], None] = time.sleep,
        resolver: Resolver = resolve,
    ) -> None:
        """`gateways`: addresses of the gateways in force, any of which has the uploads. `resolver`: of the names in URLs."""
        self._credentials = credentials
        self._gateways = gateways
        self._pause = pause
        self._resolver = resolver

    def read_blocks(
        self, source: ImageSource, pool: PoolSpec, control: JobControl, *, on_size: Callable[[int], None]
    ) -> Iterator[bytes]:
        match source:
            case UploadSource():
                return self._resumed(lambda offset: self._read_upload(source, offset), control)
            case PeerSource():
                return self._resumed(lambda offset: self._read_peer(source, offset), control)
            case UrlSource():
                blocks = read_url(source, resolver=self._resolver, cancelled=control.cancelled, on_size=on_size)
                return _until_cancelled(blocks, control)
            case HostFileSource():
                return _until_cancelled(_read_host_file(source, pool, on_size), control)
            case VolumeSource():
                raise InvalidRequest("source-not-read", "a volume is converted where it is, never read as a stream")
            case _:
                assert_never(source)

    def _resumed(self, read_from: Callable[[int], Iterator[bytes]], control: JobControl) -> Iterator[bytes]:
        """Yield a transfer that goes on where it broke off."""
        offset, breaks = 0, 0
        while True:
            before = offset
            try:
                for block in _until_cancelled(read_from(offset), control):
                    offset += len(block)
                    yield block
                return
            except TrimtabError as error:
                breaks = 1 if offset > before else breaks + 1
                if not error.retryable or error.code == "ticket-refused" or breaks > MAX_BREAKS:
                    raise
            self._pause(BREAK_PAUSE_S * random.random())

    def _read_upload(self, source: UploadSource, offset: int) -> Iterator[bytes]:
        addresses = list(self._gateways())
        if not addresses:
            raise Unavailable("no-gateways", "no gateway to read the upload from")
        address = random.choice(addresses)
        with self._channel(address, tls.CONTROLLER_NAME) as channel:
            call = GatewayServiceStub(channel).ReadUpload(
                gateway_service_pb2.ReadUploadRequest(upload_id=source.upload_id, offset=offset), timeout=STREAM_TIMEOUT_S
            )
            yield from _contents(call, peer=f"gateway {address}")

    def _read_peer(self, source: PeerSource, offset: int) -> Iterator[bytes]:
        with self._channel(source.address, source.host_id) as channel:
            # The ticket names the image: 256 random bits are known for one offer only.
            request = agent_service_pb2.ReadImageRequest(ticket=source.ticket, offset=offset)
            call = ReplicaServiceStub(channel).ReadImage(request, timeout=STREAM_TIMEOUT_S)
            yield from _contents(call, peer=f"host {source.host_id}")

    @contextlib.contextmanager
    def _channel(self, address: str, peer_name: str) -> Iterator[grpc.Channel]:
        options = tls.channel_options(peer_name, is_own_connection=True)
        channel = grpc.secure_channel(address, self._credentials.current().for_channel(), options=options)
        try:
            yield channel
        finally:
            channel.close()


def _contents(call: Iterator[object], *, peer: str) -> Iterator[bytes]:
    try:
        for message in call:
            yield message.content  # type: ignore[attr-defined]
    except grpc.RpcError as error:
        raise status.from_rpc_error(error, peer=peer) from error
    finally:
        call.cancel()  # type: ignore[attr-defined]


def _read_host_file(source: HostFileSource, pool: PoolSpec, on_size: Callable[[int], None]) -> Iterator[bytes]:
    name = source.file_name
    if not name or len(name) > 255 or name.startswith(".") or "/" in name or "\0" in name:
        raise InvalidRequest(
            "file-name-refused", "file_name must be a file of the pool's import folder, as in disk.qcow2", field="file_name"
        )
    with PoolLayout.of(pool).open(IMPORT) as directory:
        try:
            # Not blocking: a FIFO put into the folder would hang the open for ever.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=directory)
        except FileNotFoundError as error:
            raise NotFound("import-file-not-found", f"the pool's import folder has no file {name}", file_name=name) from error
        except OSError as error:
            raise InvalidRequest("file-name-refused", f"{name} in the import folder cannot be read: {error.strerror}") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidRequest("file-name-refused", f"{name} in the import folder is not a regular file", field="file_name")
        on_size(found.st_size)
        while block := os.read(descriptor, BLOCK_BYTES):
            yield block
    finally:
        os.close(descriptor)


def _until_cancelled(blocks: Iterator[bytes], control: JobControl) -> Iterator[bytes]:
    for block in blocks:
        if control.cancelled.is_set():
            raise Conflict("job-cancelled", "the transfer was cancelled")
        yield block

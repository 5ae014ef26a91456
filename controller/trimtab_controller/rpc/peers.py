"""Who is at the other end: the host id and serial in a verified client certificate, or the controller; errors carried over gRPC."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import grpc
import structlog
from cryptography import x509

from trimtab_controller import pki
from trimtab_protos.errors import Internal, PermissionDenied, TrimtabError
from trimtab_protos.status import STATUS_BY_KIND, trailing_metadata

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """A host as its certificate names it; TLS has checked the chain and the dates."""

    host_id: str
    serial: str
    address: str
    dates: tuple[datetime, datetime] | None = None
    """Not before and not after, of its certificate."""


def peer_of(context: grpc.aio.ServicerContext[Any, Any]) -> Peer:
    """Return the calling host. PermissionDenied where the certificate is not that of exactly one host."""
    chain = list(context.auth_context().get("x509_pem_cert", ()))
    try:
        certificate = x509.load_pem_x509_certificate(chain[0] if chain else b"")
    except ValueError as error:
        raise PermissionDenied("certificate-missing", "this port serves hosts with a certificate of the fleet") from error
    names = pki.dns_names(certificate)
    if len(names) != 1 or not names[0].startswith("host-"):
        raise PermissionDenied("certificate-no-host", "the certificate does not name a host")
    dates = (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    return Peer(names[0], pki.serial_of(certificate), context.peer(), dates)


def require_controller(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Raise PermissionDenied unless the caller has the controller's own certificate."""
    chain = list(context.auth_context().get("x509_pem_cert", ()))
    try:
        certificate = x509.load_pem_x509_certificate(chain[0] if chain else b"")
    except ValueError as error:
        raise PermissionDenied("certificate-missing", "only the controller's own processes may ask this") from error
    if pki.CONTROLLER_NAME not in pki.dns_names(certificate):
        raise PermissionDenied("certificate-no-controller", "only the controller's own processes may ask this")


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: TrimtabError) -> NoReturn:
    """End the call with the typed error."""
    await context.abort(STATUS_BY_KIND[error.kind], error.message, trailing_metadata(error))


@asynccontextmanager
async def typed_errors(
    context: grpc.aio.ServicerContext[Any, Any], what: str, *, count: Callable[[str], None] = lambda _code: None
) -> AsyncIterator[None]:
    """End the call with a typed error where the block raises; `count` gets its code.

    A defect of ours is logged whole and told without its insides.
    """
    try:
        yield
    except (grpc.aio.BaseError, asyncio.CancelledError, GeneratorExit):
        raise  # the call has ended already
    except TrimtabError as error:
        count(error.code)
        await abort(context, error)
    except Exception as error:
        log.error("defect in gateway", what=what, exc_info=error)
        count("internal")
        await abort(context, Internal("internal", "the controller failed; its log has the cause"))

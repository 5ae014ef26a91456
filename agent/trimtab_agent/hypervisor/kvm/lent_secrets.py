"""Lends a secret to a program: through a file in memory that has no name and that this one call has."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def in_memory(secret: bytes | None) -> Iterator[int | None]:
    """Lend the descriptor of a file with the secret, to be passed on and opened by number; None for no secret."""
    if secret is None:
        yield None
        return
    descriptor = os.memfd_create("secret", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, secret)
        yield descriptor
    finally:
        os.close(descriptor)

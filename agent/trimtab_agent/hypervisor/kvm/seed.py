"""Builds a vm's NoCloud seed: an ISO 9660 image labelled `cidata`. The same documents give the same bytes.

pycdlib stamps everything with the time of day; those stamps are set to the epoch afterwards, at the places where ISO 9660 and Rock
Ridge put them, so that two hosts agree on the file and an unchanged seed is never rewritten under a running guest.
"""

import io
from collections.abc import Iterator

import pycdlib

from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import SeedSpec

_SECTOR = 2048
_FIRST_DESCRIPTOR = 16
_PRIMARY, _SUPPLEMENTARY, _TERMINATOR = 1, 2, 255
_ROOT_RECORD_AT = 156
_VOLUME_DATES_AT, _VOLUME_DATE_BYTES, _VOLUME_DATES = 813, 17, 4
_NO_VOLUME_DATE = b"0" * 16 + b"\0"
_RECORD_DATE_AT, _RECORD_DATE_BYTES = 18, 7
_EPOCH_RECORD_DATE = bytes((70, 1, 1, 0, 0, 0, 0))
_MAX_DOCUMENT_BYTES = 1 << 20


def build(seed: SeedSpec) -> bytes:
    """Return the image. InvalidRequest: a document is too long."""
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    documents = {"meta-data": seed.meta_yaml, "user-data": seed.user_yaml or "#cloud-config\n"}
    if seed.network_yaml:
        documents["network-config"] = seed.network_yaml
    for number, (name, text) in enumerate(documents.items()):
        content = text.encode()
        if len(content) > _MAX_DOCUMENT_BYTES:
            raise InvalidRequest(
                "seed-too-large", f"{name} has {len(content)} bytes; at most {_MAX_DOCUMENT_BYTES}", field="seed"
            )
        image.add_fp(io.BytesIO(content), len(content), f"/F{number}.;1", rr_name=name, joliet_path=f"/{name}")
    written = io.BytesIO()
    image.write_fp(written)
    image.close()
    return _without_dates(bytearray(written.getvalue()))


def _without_dates(image: bytearray) -> bytes:
    for descriptor in _descriptors(image):
        dates = descriptor + _VOLUME_DATES_AT
        image[dates : dates + _VOLUME_DATE_BYTES * _VOLUME_DATES] = _NO_VOLUME_DATE * _VOLUME_DATES
        root = descriptor + _ROOT_RECORD_AT
        _reset_record(image, root)
        extent = int.from_bytes(image[root + 2 : root + 6], "little") * _SECTOR
        length = int.from_bytes(image[root + 10 : root + 14], "little")
        for record in _records(image, extent, extent + length):
            _reset_record(image, record)
    return bytes(image)


def _descriptors(image: bytearray) -> Iterator[int]:
    position = _FIRST_DESCRIPTOR * _SECTOR
    while image[position] != _TERMINATOR:
        if image[position] in (_PRIMARY, _SUPPLEMENTARY):
            yield position
        position += _SECTOR


def _records(image: bytearray, position: int, end: int) -> Iterator[int]:
    while position < end:
        length = image[position]
        if length == 0:  # the rest of a sector
            position = (position // _SECTOR + 1) * _SECTOR
            continue
        yield position
        position += length


def _reset_record(image: bytearray, record: int) -> None:
    """Set the dates of a directory record and of the Rock Ridge time stamps (`TF`) behind its name."""
    start = record + _RECORD_DATE_AT
    image[start : start + _RECORD_DATE_BYTES] = _EPOCH_RECORD_DATE
    name_length = image[record + 32]
    entry = record + 33 + name_length + (1 - name_length % 2)
    end = record + image[record]
    while entry + 4 <= end and image[entry + 2] >= 4:
        if image[entry : entry + 2] == b"TF":
            stamps = (image[entry + 2] - 5) // _RECORD_DATE_BYTES
            image[entry + 5 : entry + 5 + stamps * _RECORD_DATE_BYTES] = _EPOCH_RECORD_DATE * stamps
        entry += image[entry + 2]

"""Parses XML from anywhere: bounded, UTF-8, and without declarations, so that there is no entity to expand and no file to fetch."""

from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from trimtab_controller.cli.errors import CommandFailed, usage

XML_MAX_BYTES = 1 << 20
_DEPTH_MAX = 64


def parse(content: bytes, what: str) -> Element:
    """Return the root. A refusal names `what`."""
    if len(content) > XML_MAX_BYTES:
        raise _refused(f"{what} has more than {XML_MAX_BYTES >> 10} KiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refused(f"{what} is not UTF-8 (byte {error.start})") from error
    if "<!" in text.replace("<!--", ""):
        raise _refused(f"{what} declares a document type or entities")
    if "\x00" in text:
        raise _refused(f"{what} is no text")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 - without declarations there are no entities to expand
    except ElementTree.ParseError as error:
        raise _refused(f"{what} is no XML: {error}") from error
    if _depth(root) > _DEPTH_MAX:
        raise _refused(f"{what} is nested deeper than {_DEPTH_MAX} elements")
    return root


def _depth(root: Element) -> int:
    deepest, waiting = 0, [(root, 1)]
    while waiting:
        element, depth = waiting.pop()
        deepest = max(deepest, depth)
        waiting += [(child, depth + 1) for child in element]
    return deepest


def _refused(message: str) -> CommandFailed:
    return usage(f"FILE: {message}", code="import-refused")

"""Which release this is, as its package says."""

from importlib.metadata import version

RELEASE = version("trimtab")

"""The one error type that the lab raises for its user."""


class LabError(Exception):
    """Something the lab could not do; the message says what was tried and what came back."""

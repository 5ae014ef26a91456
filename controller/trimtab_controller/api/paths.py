"""What stands in paths, and queries that name things."""

from typing import Annotated

from fastapi import Path, Query

from trimtab_controller.api.fields import HOST_NAME_PATTERN

# A name or an id; ids are made of the same characters.
_REF = HOST_NAME_PATTERN
ProjectPath = Annotated[str, Path(pattern=_REF, max_length=63, examples=["default"], description="Name or id of the project.")]
GrantPath = Annotated[
    str, Path(pattern=rf"({_REF})|^\*$", max_length=63, examples=["default"], description="A project, or `*` for the fleet.")
]
NamePath = Annotated[str, Path(pattern=_REF, max_length=63, examples=["web1"], description="Name or id.")]
AddressPath = Annotated[
    str, Path(pattern=r"^[0-9a-z][0-9a-z.-]{0,62}$", max_length=63, examples=["192.0.2.100"], description="Address or id.")
]
UserPath = Annotated[str, Path(pattern=_REF, max_length=63, examples=["alice"], description="Name or id of the user.")]
OperationPath = Annotated[
    str, Path(pattern=r"^op-[0-9a-z]{26}$", examples=["op-01hf7y2m3n4p5q6r7s8t9v0wxy"], description="Id of the operation.")
]
HostQuery = Annotated[str, Query(pattern=rf"({_REF})|^$", max_length=63, examples=["node1"], description="Name or id of a host.")]

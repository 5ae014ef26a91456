"""Parameters that many routes take."""

from typing import Annotated

from fastapi import Depends, Request

from trimtab_controller.api.lists import ListQuery, list_query
from trimtab_controller.api.mutate import Wish, wish
from trimtab_controller.api.runtime import Runtime


async def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


InRuntime = Annotated[Runtime, Depends(_runtime)]
Listing = Annotated[ListQuery, Depends(list_query)]
Asked = Annotated[Wish, Depends(wish)]

"""Reading many chunks: neighbours in a pack in one request, opened by several threads, each checked against its id."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.chunk_index import Location
from trimtab_agent.backup.repository.repository import Repository
from trimtab_agent.backup.repository.sealing import Kind
from trimtab_protos.errors import TrimtabError

RUN_BYTES = 4 << 20
GAP_BYTES = 128 << 10
"""Two records this close are read as one: on a bucket a request costs more than the bytes between."""
WORKERS = 2
RUNS_IN_FLIGHT = 4

OnContent = Callable[[bytes, bytes], None]
"""Called with id and content, from a worker's thread, in no order."""
_Run = tuple[Sequence[Location], OnContent]
OnDamage = Callable[[bytes, TrimtabError], None]


def fetch(
    repository: Repository,
    kind: Kind,
    ids: Sequence[bytes],
    on_content: OnContent,
    *,
    on_damage: OnDamage | None = None,
    workers: int = WORKERS,
) -> None:
    """Give every content to `on_content`, each id once; a damaged one to `on_damage`, or raise its error where there is none.

    With one worker it is the caller's own thread: for whoever has several of them already.
    """
    fetch_batches(repository, kind, [(ids, on_content)], on_damage=on_damage, workers=workers)


def fetch_batches(
    repository: Repository,
    kind: Kind,
    batches: Iterable[tuple[Sequence[bytes], OnContent]],
    *,
    on_damage: OnDamage | None = None,
    workers: int = WORKERS,
) -> None:
    """Like `fetch` for batch after batch, the next one begun before the last is done. `batches` is walked in the caller's thread."""
    failed: list[tuple[bytes, OnContent]] = []
    lock = threading.Lock()

    def runs() -> Iterator[_Run]:
        for ids, on_content in batches:
            places: list[Location] = []
            for id in dict.fromkeys(ids):
                place = repository.index.find(id)
                if place is None:
                    with lock:
                        failed.append((id, on_content))
                else:
                    places.append(place)
            yield from ((run, on_content) for run in runs_of(places))

    def work(run: _Run) -> None:
        for id in _read_run(repository, *run):
            with lock:
                failed.append((id, run[1]))

    if workers == 1:
        for run in runs():
            work(run)
    else:
        _in_parallel(runs(), work, workers)
    for id, on_content in failed:  # rare: one by one, from any other copy, with the index read anew
        try:
            content = repository.read(kind, id)
        except TrimtabError as error:
            if on_damage is None or not errors.is_damage(error):
                raise
            on_damage(id, error)
            continue
        on_content(id, content)


def runs_of(places: Sequence[Location]) -> Iterator[Sequence[Location]]:
    """Yield groups of records that one request reads, in the order of the packs' bytes."""
    by_pack: Mapping[str, list[Location]] = defaultdict(list)
    for place in places:
        by_pack[place.pack].append(place)
    for pack in sorted(by_pack):
        run: list[Location] = []
        for place in sorted(by_pack[pack], key=lambda found: found.entry.offset):
            if run:
                begin, end = run[0].entry.offset, run[-1].entry.offset + run[-1].entry.length
                is_near = place.entry.offset - end <= GAP_BYTES
                if not is_near or place.entry.offset + place.entry.length - begin > RUN_BYTES:
                    yield run
                    run = []
            run.append(place)
        if run:
            yield run


def _read_run(repository: Repository, run: Sequence[Location], on_content: OnContent) -> list[bytes]:
    """Return the ids of those that could not be had from here."""
    pack, begin = run[0].pack, run[0].entry.offset
    failed: list[bytes] = []
    try:
        end = run[-1].entry.offset + run[-1].entry.length
        piece = memoryview(repository.blobs.get_range(pack, begin, end - begin))
    except TrimtabError as error:
        if not errors.is_damage(error):
            raise
        return [place.entry.id for place in run]
    for place in run:
        at = place.entry.offset - begin
        try:
            content = repository.packs.open(pack, place.entry, piece[at : at + place.entry.length])
        except TrimtabError as error:
            if not errors.is_damage(error):
                raise
            repository.note_failure(place, error)
            failed.append(place.entry.id)
            continue
        on_content(place.entry.id, content)
    return failed


def _in_parallel(runs: Iterator[_Run], work: Callable[[_Run], None], count: int) -> None:
    pending: set[Future[None]] = set()
    with ThreadPoolExecutor(count, thread_name_prefix="fetch") as workers:
        try:
            for run in runs:
                pending.add(workers.submit(work, run))
                if len(pending) >= RUNS_IN_FLIGHT:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in pending:
                future.result()
        finally:
            workers.shutdown(wait=True, cancel_futures=True)

"""Sets of cpus as Linux and libvirt write them: `4-15,20`."""

from collections.abc import Collection

from trimtab_protos.errors import InvalidRequest

_CPU_MAX = 8191


def parse(text: str, *, field: str) -> frozenset[int]:
    """Return the numbers; none of ''. InvalidRequest names the field and what is wrong."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, separator, last = part.partition("-")
        bounds = (first, last if separator else first)
        if not all(one.isascii() and one.isdigit() and len(one) <= 4 for one in bounds):
            raise InvalidRequest("cpus-wrong", f"{field}: {part[:20]!r} is no cpu and no range; for example 4-15,20", field=field)
        begin, end = (int(one) for one in bounds)
        if not begin <= end <= _CPU_MAX:
            raise InvalidRequest("cpus-wrong", f"{field}: {part} runs backwards or beyond {_CPU_MAX}", field=field)
        found.update(range(begin, end + 1))
    return frozenset(found)


def text_of(cpus: Collection[int]) -> str:
    """Return the numbers in the shortest form."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{begin}-{end}" if end > begin else f"{begin}" for begin, end in runs)

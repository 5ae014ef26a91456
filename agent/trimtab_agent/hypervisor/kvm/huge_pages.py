"""Which huge pages guests can be put on: those of a size that is mounted. Of others libvirt tells in its
capabilities too, and then starts no guest on them (seen with 9.0).
"""

import re
from pathlib import Path

_UNIT_KIB = {"K": 1, "M": 1 << 10, "G": 1 << 20}


def mounted_sizes_kib() -> frozenset[int]:
    """Return the sizes that are mounted on this host, in KiB."""
    return sizes_in(Path("/proc/self/mounts").read_text())


def sizes_in(mounts: str) -> frozenset[int]:
    """Return the sizes in the kernel's table of mounts; it names the size of each, the default one too."""
    found = set()
    for line in mounts.splitlines():
        _device, _where, kind, options, *_ = line.split()
        size = re.search(r"(?:^|,)pagesize=(\d+)([KMG])", options)
        if kind == "hugetlbfs" and size is not None:
            found.add(int(size[1]) * _UNIT_KIB[size[2]])
    return frozenset(found)

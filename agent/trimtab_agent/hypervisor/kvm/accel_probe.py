"""Finds out whether KVM really runs guests here, by running one for a moment.

`/dev/kvm` that opens proves nothing: on some nested machines QEMU starts, libvirt lists the kvm domain type, and every guest spins for
ever without a sign. Real-mode code runs even there; what separates such a machine from a good one is entering long mode. So the probe
is a firmware image that does just that and then ends QEMU through `isa-debug-exit`.
"""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

TIMEOUT_S = 2.0
"""A good machine answers in a tenth of a second; a bad one never."""
_ANSWER = 33
"""`isa-debug-exit` ends QEMU with 2·value + 1; the image writes 16."""
_IMAGE_BYTES = 65536
_RESET_VECTOR = 0xFFF0

_START = bytes.fromhex(
    "fa"  # cli
    "31c0 8ed8 8ec0"  # xor ax,ax; mov ds,ax; mov es,ax
    "fc bf0040 b90018 f3ab"  # clear 12 KiB at 0x4000 for page tables
    "c706 0040 0350"  # PML4[0] = 0x5000, present, writable
    "c706 0050 0360"  # PDPT[0] = 0x6000, present, writable
    "c706 0060 8300"  # PD[0] = 2 MiB page at 0, present, writable
    "66b800400000 0f22d8"  # cr3 = 0x4000
    "66b820000000 0f22e0"  # cr4 = PAE
    "66b9800000c0 0f32 80cc01 0f30"  # EFER.LME = 1
    "2e660f01168000"  # lgdt cs:[0x80]
    "66b801000080 0f22c0"  # cr0 = PG | PE
    "66ea59000f000800"  # jump to 8:0xf0059, into 64-bit code
    "b900001000 ffc9 75fc"  # count a while, so that single steps would not do
    "b010 e6f4"  # out 0xf4, 16
    "f4 ebfd"  # hlt, for ever
)
_DESCRIPTORS_AT = 0x70
_DESCRIPTORS = bytes.fromhex(
    "0000000000000000"  # null
    "00000000009a2000"  # 64-bit code
    "0f00 70000f00"  # what lgdt loads: limit 15, base 0xf0070
)
_JUMP_TO_START = bytes.fromhex("ea000000f0")  # jmp f000:0000


def firmware_image() -> bytes:
    """Return the probe's firmware."""
    image = bytearray(_IMAGE_BYTES)
    image[: len(_START)] = _START
    image[_DESCRIPTORS_AT : _DESCRIPTORS_AT + len(_DESCRIPTORS)] = _DESCRIPTORS
    image[_RESET_VECTOR : _RESET_VECTOR + len(_JUMP_TO_START)] = _JUMP_TO_START
    return bytes(image)


def runs_guests(accelerator: str, *, timeout_s: float = TIMEOUT_S, firmware: bytes = b"") -> bool:
    """Tell whether QEMU with this accelerator gets a guest into long mode in time. `firmware`: another guest than the probe's own."""
    with tempfile.NamedTemporaryFile(prefix="trimtab-probe-") as image:
        image.write(firmware or firmware_image())
        image.flush()
        command = [
            "qemu-system-x86_64",
            "-accel",
            accelerator,
            "-M",
            "pc",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ]
        command += ["-m", "16", "-bios", image.name, "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]
        try:
            ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=timeout_s)
        except (subprocess.TimeoutExpired, FileNotFoundError):
            return False
    return ended.returncode == _ANSWER


def accelerator(
    runtime_dir: Path, boot_id: str, *, device: Path = Path("/dev/kvm"), runs: Callable[[str], bool] = runs_guests
) -> str:
    """Return `kvm` where it really runs guests, else `tcg`; probed once per boot of the host."""
    remembered = runtime_dir / "accelerator.json"
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        answer = json.loads(remembered.read_text())
        if answer["boot_id"] == boot_id:
            return str(answer["accelerator"])
    found = "kvm" if device.exists() and runs("kvm") else "tcg"
    log.info("acceleration probed", accelerator=found, has_device=device.exists())
    runtime_dir.mkdir(parents=True, exist_ok=True)
    temporary = remembered.with_suffix(".new")
    temporary.write_text(json.dumps({"boot_id": boot_id, "accelerator": found}))
    temporary.replace(remembered)
    return found

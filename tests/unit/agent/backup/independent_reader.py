"""A reader of repositories written from docs/backup-format.md alone. It imports nothing of Trimtab: that is its point."""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HEADER = struct.Struct("<32sBBHII12s")
HEAD = struct.Struct("<8sI16s")
ENTRY = struct.Struct("<32sBQII")
HOLE = bytes(32)
CHUNK, PAGE, FOOTER, MANIFEST = 0, 1, 2, 4


class IndependentReader:
    """Reads a repository in a folder with the text of its key; needs no index."""

    def __init__(self, folder: Path, key_text: str) -> None:
        self.folder = folder
        key = self._key(key_text)
        config = json.loads((folder / "config.json").read_bytes())
        newest = max((folder / "keys").iterdir(), key=lambda path: int(path.name.split("-")[0]))
        ring = json.loads(newest.read_bytes())
        bound = f"trimtab-keyring|1|{config['repository_id']}|{ring['generation']}|{ring['key_id']}"
        opened = json.loads(AESGCM(key).decrypt(bytes.fromhex(ring["nonce"]), bytes.fromhex(ring["sealed"]), bound.encode()))
        self.id_key = bytes.fromhex(opened["id_key"])
        self.data_keys = {int(version): bytes.fromhex(text) for version, text in opened["data_keys"].items()}
        seal = config.pop("seal")
        canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
        assert blake3(canonical, key=self.id_key).hexdigest() == seal
        self.places: dict[bytes, tuple[Path, int, int]] = {}
        for pack in sorted((folder / "packs").iterdir()):
            self._learn(pack)

    def backups(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted((self.folder / "backups").glob("*/*")):
            blob = path.read_bytes()
            if blob == b"TTREVOKED\x01\n":
                continue
            magic, version, salt = HEAD.unpack_from(blob)
            assert magic == b"TTSEAL\x01\n"
            name = path.relative_to(self.folder).as_posix()
            found.append(json.loads(self._open(blob[HEAD.size :], MANIFEST, version, salt, name)))
        return found

    def disk(self, manifest: dict[str, Any], name: str) -> bytes:
        disk = next(disk for disk in manifest["disks"] if disk["name"] == name)
        content = bytearray(disk["size_bytes"])
        root = blake3(f"{disk['size_bytes']}|{disk['chunk_bytes']}".encode())
        chunks = -(-disk["size_bytes"] // disk["chunk_bytes"])
        for number in range(-(-chunks // 1024)):
            page_id = bytes.fromhex(disk["pages"].get(str(number), HOLE.hex()))
            root.update(page_id)
            if page_id == HOLE:
                continue
            page = self.record(PAGE, page_id)
            for at in range(0, len(page), 32):
                id = page[at : at + 32]
                if id != HOLE:
                    begin = (number * 1024 + at // 32) * disk["chunk_bytes"]
                    chunk = self.record(CHUNK, id)
                    content[begin : begin + len(chunk)] = chunk
        assert root.hexdigest() == disk["root"]
        return bytes(content)

    def attachment(self, manifest: dict[str, Any], name: str) -> bytes:
        file = next(file for file in manifest["attachments"] if file["name"] == name)
        return b"".join(self.record(CHUNK, bytes.fromhex(id)) for id in file["chunks"])

    def record(self, kind: int, id: bytes) -> bytes:
        pack, offset, length = self.places[id]
        with pack.open("rb") as file:
            _, version, salt = HEAD.unpack(file.read(HEAD.size))
            file.seek(offset)
            content = self._open(file.read(length), kind, version, salt, "pack")
        assert self._id(kind, content) == id
        return content

    def _learn(self, pack: Path) -> None:
        blob = pack.read_bytes()
        magic, version, salt = HEAD.unpack_from(blob)
        assert magic == b"TTPACK\x01\n"
        offset, end = struct.unpack("<Q8s", blob[-16:])
        assert end == b"TTPEND\x01\n"
        footer = self._open(blob[offset:-16], FOOTER, version, salt, "pack")
        for id, _kind, at, length, _raw in ENTRY.iter_unpack(footer):
            self.places[id] = (pack, at, length)

    def _open(self, record: bytes, kind: int, version: int, salt: bytes, context: str) -> bytes:
        id, found, flags, _, raw, stored, nonce = HEADER.unpack_from(record)
        assert found == kind
        key = blake3(salt + context.encode(), key=self.data_keys[version]).digest()
        content = AESGCM(key).decrypt(nonce, record[56 : 56 + stored], record[:56])
        if flags & 1:
            content = zstandard.ZstdDecompressor().decompress(content, max_output_size=raw)
        assert len(content) == raw
        assert self._id(kind, content) == id
        return content

    def _id(self, kind: int, content: bytes) -> bytes:
        return blake3(content, key=blake3(f"kind {kind}".encode(), key=self.id_key).digest()).digest()

    @staticmethod
    def _key(text: str) -> bytes:
        letters = text.removeprefix("ttk1-").replace("-", "").upper()
        decoded = base64.b32decode(letters + "=" * (-len(letters) % 8))
        assert blake3(decoded[:32], derive_key_context="trimtab backup key check v1").digest(length=3) == decoded[32:]
        return decoded[:32]

"""A guest's side of a line, byte by byte: what these tests say does not come from the library that the station uses."""

import struct
from ipaddress import IPv4Address

MAC = bytes.fromhex("525400aabb01")
STATION_MAC = bytes.fromhex("027474000001")
EVERYBODY = b"\xff" * 6
SYN, RST, ACK = 2, 4, 16


def packed(address: str) -> bytes:
    return IPv4Address(address).packed


def arp(op: int, *, sender: str, target: str, to: bytes = EVERYBODY) -> bytes:
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, op) + MAC + packed(sender) + b"\0" * 6 + packed(target)
    return to + MAC + b"\x08\x06" + body


def ip(protocol: int, source: str, target: str, data: bytes) -> bytes:
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(data), 1, 0, 64, protocol, 0, packed(source), packed(target))
    return STATION_MAC + MAC + b"\x08\x00" + head[:10] + struct.pack(">H", ones_complement(head)) + head[12:] + data


def tcp(source: str, target: str, *, sport: int, dport: int, seq: int, ack: int, flags: int) -> bytes:
    return ip(6, source, target, struct.pack(">HHIIBBHHH", sport, dport, seq, ack, 5 << 4, flags, 1024, 0, 0))


def dhcp(kind: int, *, wished: str = "", xid: int = 7) -> bytes:
    options = bytes([53, 1, kind]) + (bytes([50, 4]) + packed(wished) if wished else b"") + b"\xff"
    body = struct.pack(">BBBBIHHIIII16s64s128sI", 1, 1, 6, 0, xid, 0, 0, 0, 0, 0, 0, MAC, b"", b"", 0x63825363) + options
    return ip(17, "0.0.0.0", "255.255.255.255", struct.pack(">HHHH", 68, 67, 8 + len(body), 0) + body)


def ones_complement(content: bytes) -> int:
    padded = content + b"\0" * (len(content) % 2)
    total = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Segment:
    """A TCP segment or UDP datagram that came, with its checksums looked at as a guest does."""

    def __init__(self, frame: bytes) -> None:
        head, self.data = frame[14:34], frame[34:]
        self.to, self.from_mac = frame[:6], frame[6:12]
        assert frame[12:14] == b"\x08\x00"
        assert ones_complement(head) == 0, "the header's checksum is wrong"
        assert struct.unpack(">H", head[2:4])[0] == len(frame) - 14, "the header's length is wrong"
        self.protocol = head[9]
        self.source, self.target = str(IPv4Address(head[12:16])), str(IPv4Address(head[16:20]))
        pseudo = head[12:20] + struct.pack(">BBH", 0, self.protocol, len(self.data))
        assert ones_complement(pseudo + self.data) == 0, "the segment's checksum is wrong"
        self.sport, self.dport = struct.unpack(">HH", self.data[:4])

    @property
    def sequence(self) -> int:
        return int(struct.unpack(">I", self.data[4:8])[0])

    @property
    def flags(self) -> int:
        return self.data[13]

    def dhcp_options(self) -> dict[int, bytes]:
        assert (self.protocol, self.sport, self.dport) == (17, 67, 68)
        content, options = self.data[8 + 240 :], {}
        while content and content[0] != 255:
            options[content[0]] = content[2 : 2 + content[1]]
            content = content[2 + content[1] :]
        return options

    def given_address(self) -> str:
        return str(IPv4Address(self.data[8 + 16 : 8 + 20]))

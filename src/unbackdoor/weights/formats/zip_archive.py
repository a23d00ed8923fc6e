"""Zip archives under bounds: every entry is where the directory says, once, and as long as it says.

The directory at the end of a zip file and the headers before its entries state the same facts twice. Where
they differ, two readers see two files, and a scanner may check the harmless one. Such an archive is
refused, as are entries that overlap, expand without measure, are encrypted, or have names that lead out of a
folder.

Some readers go by the directory, others from header to header from the first byte on. So the entries follow
each other without gaps from the first byte to the directory, and behind the directory is nothing that another
reader would take for a second one.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.weights.formats.buffers import Buffer, short
from unbackdoor.weights.formats.limits import spend

MAX_ENTRIES = 50_000  # a ResNet-152 has 900 storages
MAX_NAME = 1024  # bytes
MAX_PACKED = 64 << 20  # bytes, of all entries that deflate made smaller: program text and small pickles
MAX_RATIO = 200  # the program text of TorchScript reaches 15; a bomb 1,000

STORED, DEFLATED = 0, 8
_END, _LOCATOR, _END64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_CENTRAL, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_END_SIZE, _LOCATOR_SIZE, _END64_SIZE, _CENTRAL_SIZE, _LOCAL_SIZE = 22, 20, 56, 46, 30
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800
_KNOWN_FLAGS = 0x6 | _DESCRIPTOR | _UTF8  # two of them say how hard was packed
_DESCRIPTOR_MARK = b"PK\x07\x08"
_UNICODE_PATH = 0x7075  # an extra field with another name, which some readers prefer


@dataclass(frozen=True)
class Entry:
    """One file of an archive.

    Attributes:
        name: Path inside the archive, with forward slashes.
        start: First byte of the content in the file.
        packed: Bytes in the file.
        size: Bytes of the content.
        method: ``STORED`` or ``DEFLATED``.
        crc: Checksum in the directory.
    """

    name: str
    start: int
    packed: int
    size: int
    method: int
    crc: int


def _folded(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass").lower()  # the letters of ASCII alone, as torch does


class Archive:
    """A zip file in memory or mapped into it; only its directory has been read.

    Args:
        data: The whole archive.
        where: What to call it in messages.

    Raises:
        InputError: If it is cut short or is no zip file.
        UnsafeFile: If it can be read in two ways, or is built to exhaust the machine.
    """

    def __init__(self, data: Buffer, where: object) -> None:
        self._data = data
        self._where = where
        try:
            self.entries: Mapping[str, Entry] = MappingProxyType(self._read())
            self._folded = {_folded(name): entry for name, entry in self.entries.items()}
        except (struct.error, IndexError, ValueError, OverflowError) as error:
            raise self._cut(str(error)) from error

    @property
    def root(self) -> str:
        """The folder of the first entry, which is where torch looks for the others; empty for none."""
        for name in self.entries:
            return name.partition("/")[0] if "/" in name else ""
        return ""

    def find(self, name: str) -> Entry | None:
        """Return an entry, or None.

        Raises:
            UnsafeFile: If it is written in other letters, so that only some readers find it.
        """
        entry = self._folded.get(_folded(name))
        if entry is not None and entry.name != name:
            raise self._unsafe("torch finds an entry where other readers find none", short(entry.name))
        return entry

    def content(self, entry: Entry, limit: int) -> bytes:
        """Return the content of an entry.

        Raises:
            InputError: If it does not unpack.
            UnsafeFile: If it is longer than ``limit``.
        """
        if entry.size > limit:
            raise UnsafeFile(
                f"the entry {short(entry.name)} of the archive is too large",
                expected=f"at most {limit} bytes",
                got=entry.size,
                where=self._where,
            )
        spend("unpacked", entry.size)
        packed = bytes(self._data[entry.start : entry.start + entry.packed])
        if entry.method == STORED:
            return packed
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = unpacker.decompress(packed, entry.size + 1)
        except zlib.error as error:
            raise self._cut(f"{short(entry.name)} does not unpack") from error
        if len(content) != entry.size or not unpacker.eof or unpacker.unused_data:
            raise self._unsafe("an entry unpacks to another size than it states", short(entry.name))
        return content

    def head(self, entry: Entry, count: int = 16) -> bytes:
        """Return the first bytes of an entry."""
        packed = bytes(self._data[entry.start : entry.start + min(entry.packed, 4096)])
        if entry.method == STORED:
            return packed[:count]
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, count)
        except zlib.error as error:
            raise self._cut(f"{short(entry.name)} does not unpack") from error

    def inside(self, entry: Entry, limit: int) -> Buffer:
        """Return the content of an entry, without copying it where it is stored as it is.

        Raises:
            UnsafeFile: If it is packed and longer than ``limit``.
        """
        if entry.method == STORED:
            return memoryview(self._data)[entry.start : entry.start + entry.size]
        return self.content(entry, limit)

    def window(self, entry: Entry) -> tuple[int, int]:
        """Return first byte and length of an entry that is stored as it is.

        Raises:
            UnsafeFile: If it is packed, which no writer of weights does.
        """
        if entry.method != STORED:
            raise self._unsafe(
                "weights are packed, so that the archive unpacks to more than it holds", short(entry.name)
            )
        return entry.start, entry.size

    # -------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Entry]:
        end, count, size, offset = self._locate()
        if count > MAX_ENTRIES:
            raise UnsafeFile(
                "the archive has too many entries",
                expected=f"at most {MAX_ENTRIES}",
                got=count,
                where=self._where,
            )
        if offset + size != end:
            raise self._unsafe(
                "the directory of the archive is not where it is said to be", f"{offset} + {size}, not {end}"
            )
        entries: dict[str, Entry] = {}
        seen: set[bytes] = set()
        spans: list[tuple[int, int, int]] = []
        at = offset
        for _ in range(count):
            entry, header, behind, at = self._central(at, end)
            # Torch looks names up without regard to case, other readers do not.
            if _folded(entry.name) in seen:
                raise self._unsafe("two entries of the archive have one name", short(entry.name))
            seen.add(_folded(entry.name))
            spans.append((header, entry.start + entry.packed, behind))
            entries[entry.name] = entry
        if at != end:
            raise self._unsafe(
                "the directory of the archive has more entries than it counts", f"{end - at} bytes"
            )
        self._check_spans(sorted(spans), offset)
        self._check_sizes(entries)
        return entries

    def _locate(self) -> tuple[int, int, int, int]:
        # Returns where the directory ends, its number of entries, its size and its offset.
        data, total = self._data, len(self._data)
        tail_start = max(0, total - _END_SIZE - _FULL16)
        tail = bytes(data[tail_start:])
        ends, last = [], -1
        at = tail.find(_END)
        while 0 <= at <= len(tail) - _END_SIZE:
            last = tail_start + at
            if at + _END_SIZE + struct.unpack_from("<H", tail, at + 20)[0] == len(tail):
                ends.append(last)
            at = tail.find(_END, at + 1)
        if not ends:
            raise self._cut("no directory at its end")
        # Readers that do not look at the length of the comment take the last one.
        if ends != [last]:
            raise self._unsafe("the archive has two directories", f"at {[*ends, last]}")
        end = ends[0]
        _, disk, first, here, count, size, offset, _ = struct.unpack("<4s4H2LH", data[end : end + _END_SIZE])
        if disk or first or here != count:
            raise self._unsafe("the archive claims to be one of several volumes", f"disk {disk}")
        if end < _LOCATOR_SIZE or bytes(data[end - _LOCATOR_SIZE : end - _LOCATOR_SIZE + 4]) != _LOCATOR:
            return end, count, size, offset
        _, _, end64, _ = struct.unpack("<4sLQL", data[end - _LOCATOR_SIZE : end])
        if end64 + _END64_SIZE != end - _LOCATOR_SIZE or bytes(data[end64 : end64 + 4]) != _END64:
            raise self._unsafe("the large directory of the archive is not where it is said to be", end64)
        _, _, _, _, disk, first, here, count64, size64, offset64 = struct.unpack(
            "<4sQ2H2L4Q", data[end64 : end64 + _END64_SIZE]
        )
        stories = ((count, count64, _FULL16), (size, size64, _FULL32), (offset, offset64, _FULL32))
        if disk or first or here != count64 or any(a not in (b, full) for a, b, full in stories):
            raise self._unsafe("the two directories of the archive differ", f"{count64} and {count} entries")
        return end64, count64, size64, offset64

    def _central(self, at: int, end: int) -> tuple[Entry, int, int, int]:
        data = self._data
        fixed = struct.unpack("<4s6H3L5H2L", data[at : at + _CENTRAL_SIZE])
        signature, made_by, _, flags, method, _, _, crc, packed, size = fixed[:10]
        name_size, extra_size, comment_size, _, _, attributes, header = fixed[10:]
        if signature != _CENTRAL:
            raise self._cut(f"no entry at {at}")
        after = at + _CENTRAL_SIZE + name_size + extra_size + comment_size
        if after > end:
            raise self._cut("an entry reaches beyond the directory")
        raw = bytes(data[at + _CENTRAL_SIZE : at + _CENTRAL_SIZE + name_size])
        name = self._name(raw, flags)
        extra = bytes(data[at + _CENTRAL_SIZE + name_size : at + _CENTRAL_SIZE + name_size + extra_size])
        size, packed, header = self._large(extra, [size, packed, header], raw)
        self._check_kind(name, flags, method, made_by, attributes, size, packed)
        start = self._local(header, raw, flags, method, size, packed)
        entry = Entry(name, start, packed, size, method, crc)
        return entry, header, self._descriptor(entry) if flags & _DESCRIPTOR else 0, after

    def _descriptor(self, entry: Entry) -> int:
        # Crc and sizes once more, with or without a mark, in 32 or 64 bits. Returns how many bytes.
        at = entry.start + entry.packed
        found = bytes(self._data[at : at + 24])
        mark = 4 if found.startswith(_DESCRIPTOR_MARK) else 0
        for form in ("<4x2Q", "<4x2L"):
            length = mark + struct.calcsize(form)
            if len(found) >= length and struct.unpack_from(form, found, mark) == (entry.packed, entry.size):
                return length
        return 0

    def _large(self, extra: bytes, values: list[int], name: bytes) -> list[int]:
        # Sizes and offsets beyond 32 bits stand in an extra field, in this order, only where they are needed.
        at, seen = 0, False
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            if kind == _UNICODE_PATH and extra[at + 9 : at + 4 + length] != name:
                raise self._unsafe("an entry of the archive has two names", short(name))
            if kind == 1:
                if seen:
                    raise self._unsafe("an entry of the archive states its size twice", "two zip64 fields")
                seen = True
                wide = iter(struct.unpack(f"<{length // 8}Q", extra[at + 4 : at + 4 + length // 8 * 8]))
                values = [next(wide, value) if value == _FULL32 else value for value in values]
            at += 4 + length
        return values

    def _name(self, raw: bytes, flags: int) -> str:
        if len(raw) > MAX_NAME:
            raise self._unsafe("a name in the archive is too long", len(raw))
        try:
            name = raw.decode("utf-8" if flags & _UTF8 else "ascii")
        except UnicodeDecodeError as error:
            # Torch takes the bytes as they are, others guess what they mean.
            raise self._unsafe("a name in the archive is read in several ways", short(raw)) from error
        parts = name.removesuffix("/").split("/")
        if "\\" in name or "\0" in name or ":" in parts[0] or any(part in ("", ".", "..") for part in parts):
            raise self._unsafe("a name in the archive leads out of its folder", short(name))
        return name

    def _check_kind(
        self, name: str, flags: int, method: int, made_by: int, attributes: int, size: int, packed: int
    ) -> None:
        if flags & _ENCRYPTED:
            raise self._unsafe("an entry of the archive is encrypted", short(name))
        if flags & ~_KNOWN_FLAGS:
            raise self._unsafe("an entry of the archive is of an unknown kind", f"{short(name)}, {flags:#x}")
        if name.endswith("/") and size:
            raise self._unsafe("a folder of the archive has content", short(name))
        if method not in (STORED, DEFLATED):
            raise self._unsafe(
                "an entry of the archive is packed in an unknown way", f"{short(name)}, method {method}"
            )
        if method == STORED and size != packed:
            raise self._unsafe("an entry of the archive has two sizes", f"{short(name)}, {size} and {packed}")
        mode = attributes >> 16 if made_by >> 8 == 3 else 0
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise self._unsafe("an entry of the archive is a link or a device", short(name))

    def _local(self, header: int, name: bytes, flags: int, method: int, size: int, packed: int) -> int:
        data = self._data
        signature, _, flags2, method2, _, _, _, packed2, size2, name_size, extra_size = struct.unpack(
            "<4s5H3L2H", data[header : header + _LOCAL_SIZE]
        )
        if signature != _LOCAL:
            raise self._cut(f"no entry at {header}")
        after = header + _LOCAL_SIZE + name_size
        start = after + extra_size
        size2, packed2 = self._large(bytes(data[after:start]), [size2, packed2], name)
        same = bytes(data[header + _LOCAL_SIZE : after]) == name and method == method2
        same &= (flags ^ flags2) & ~0x6 == 0
        # Sizes may be left to the descriptor behind the content; then they are zero here.
        unknown = bool(flags2 & _DESCRIPTOR)
        for here, there in ((size2, size), (packed2, packed)):
            same &= here == there or (unknown and here in (0, _FULL32))
        if not same:
            raise self._unsafe(
                "an entry of the archive is described in two ways", short(name.decode("utf-8", "replace"))
            )
        return int(start)

    def _check_spans(self, spans: list[tuple[int, int, int]], directory: int) -> None:
        # Each begin and end, and what may stand behind the end.
        for (_, end, behind), (begin, _, _) in zip(
            [(0, 0, 0), *spans], [*spans, (directory, directory, 0)], strict=True
        ):
            if end > begin:
                raise self._unsafe(
                    "entries of the archive overlap, so that it unpacks to more than it holds", f"at {begin}"
                )
            if end + behind != begin:
                raise self._unsafe("the archive holds what its directory does not name", f"at {end}")

    def _check_sizes(self, entries: Mapping[str, Entry]) -> None:
        packed = [entry for entry in entries.values() if entry.method == DEFLATED]
        total = sum(entry.size for entry in packed)
        for entry in packed:
            if entry.size > MAX_RATIO * max(entry.packed, 16):
                raise self._unsafe(
                    "the archive unpacks to more than it holds",
                    f"{short(entry.name)}, {entry.packed} to {entry.size} bytes",
                )
        if total > MAX_PACKED:
            raise self._unsafe(
                "the archive unpacks to more than it holds", f"{total} bytes in packed entries"
            )

    def _cut(self, what: str) -> InputError:
        return InputError(
            "the archive is damaged or cut short",
            got=what,
            where=self._where,
            remedy="Copy or download it again",
        )

    def _unsafe(self, problem: str, got: object) -> UnsafeFile:
        return UnsafeFile(problem, got=got, where=self._where, remedy="Ask its author for safetensors")

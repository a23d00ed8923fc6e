"""Any pickle: no name that one of Python's own machines would import goes unseen by the reader here."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import struct
import warnings
from contextlib import suppress
from typing import Any

import pytest

from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.weights.formats.torch_save import pickle_reader as pickles
from unbackdoor.weights.formats.torch_save.pickle_globals import Name
from unbackdoor.weights.formats.torch_save.pickle_reader import Trail

CALL = b"cposix\nsystem\n)R"
LINES = [
    b"0", b"1", b"01", b"00", b"010", b"0x1f", b"0b1", b"0o7", b"1_0", b" 7", b"7 ", b"-3", b"1L", b"09",
    b"1.5", b"nan", b"1e5", b'"x"', b"'\\x41'", b"", b"\\u0041", b"\xff", b"12345678901234567890",
]  # fmt: skip
TEXTS = [b"", b"ab", b"\xc3\xa9", b"\xff", b"\xed\xa0\x80"]
# Left out: what ends a pickle, what a frame is measured by, and a fault of the machine in C.
LEFT_OUT = ("STOP", "PROTO", "BYTEARRAY8", "READONLY_BUFFER")
OPCODES = [opcode for opcode in pickletools.opcodes if opcode.name not in LEFT_OUT]
PUSHES = [opcode for opcode in OPCODES if not opcode.stack_before and opcode.name not in ("POP", "MARK")]
COUNTS = {"1": "<B", "4": "<I", "8": "<Q"}


class Anything:
    """Stands for whatever is imported, and does nothing whatever is done with it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Anything:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


class Seen(Trail):
    """Keeps every name, those of plain tensors too."""

    def __init__(self) -> None:
        super().__init__()
        self.every: list[Name] = []

    def record(self, name: Name) -> None:
        self.every.append(name)
        super().record(name)


def imported(machine: type, content: bytes) -> int:
    """Return how many names a machine of Python imports before it ends or fails; nothing is imported."""
    seen = []

    class Watched(machine):  # type: ignore[misc]
        def find_class(self, module: str, name: str) -> type:
            seen.append((module, name))
            return Anything

        def persistent_load(self, _: Any) -> Anything:
            return Anything()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(Exception):  # hostile bytes make these machines raise anything
            Watched(io.BytesIO(content)).load()
    return len(seen)


def argument(opcode: pickletools.OpcodeInfo, draw: random.Random) -> bytes:
    kind = opcode.arg.name if opcode.arg is not None else ""
    if kind == "":
        return b""
    if kind == "stringnl_noescape_pair":
        return draw.choice([b"os\nsystem\n", b"\nx\n", b"x \ny\n", b"a\xff\nb\n"])
    if "nl" in kind:
        return draw.choice(LINES) + draw.choice([b"\n"] * 9 + [b"\r\n"])
    if kind.startswith(("string", "unicodestring", "bytes", "long")):
        text = draw.choice(TEXTS)
        return struct.pack(COUNTS[kind[-1]], len(text)) + text
    form = {"uint1": "<B", "uint2": "<H", "int4": "<i", "uint4": "<I", "uint8": "<Q", "float8": ">d"}[kind]
    return struct.pack(form, draw.choice([0, 1, 2, 5, 9, 255]))


def program(draw: random.Random) -> bytes:
    code = draw.choice([b"", b"\x80\x02", b"\x80\x04"])
    for _ in range(draw.randint(1, 14)):
        opcode = draw.choice(draw.choice([PUSHES, OPCODES]))
        if opcode.name != "FRAME" or draw.random() < 0.2:
            code += opcode.code.encode("latin-1") + argument(opcode, draw)
        code += CALL[:-2] if draw.random() < 0.25 else b""
    return code + CALL + b"."


def unseen(code: bytes) -> bool:
    """Tell whether a machine of Python imports more than is seen here, and the file is not refused for it."""
    trail = Seen()
    try:
        pickles.read(io.BytesIO(code), trail, pickles.Stub, nested=lambda *_: None, depth=1)
    except UnsafeFile:
        return False
    except InputError:
        pass
    machines = (pickle.Unpickler, pickle._Unpickler)  # type: ignore[attr-defined]
    most = max(imported(machine, code) for machine in machines)
    return most > len(trail.every) and not trail.dangerous


def test_no_name_goes_unseen() -> None:
    draw = random.Random(0)
    assert [code for code in (program(draw) for _ in range(3000)) if unseen(code)] == []


@pytest.mark.parametrize(
    "before",
    [
        b"I0b1\n0", b"I0o17\n0", b"I010\n0", b"L0b1L\n0", b"L0o7\n0", b"I 7 \n0", b"I1_0\n0",  # numbers
        b"](e0", b"}(u0", b")(e0", b")(u0", b"K\x01(u0",  # nothing is added to what takes nothing
        b"\x96\x01\0\0\0\0\0\0\0aK\x01a0",  # bytes that can be changed
        b"\x96\x01\0\0\0\0\0\0\0aK\x00K\x01s0",
        b"]K\x01aK\x00K\x02s0",  # an item of a list
        b"\x8c\x03\xed\xa0\x800", b"X\x02\0\0\0\xc3\xa90",
    ],
)  # fmt: skip
def test_a_payload_behind_what_only_python_takes(before: bytes) -> None:
    code = b"\x80\x02" + before + CALL + b"."
    assert imported(pickle.Unpickler, code) == 1
    trail = Trail()
    pickles.read(io.BytesIO(code), trail, pickles.Stub, nested=lambda *_: None)
    assert trail.dangerous == ["posix.system"]


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x04iposix\nsystem\n.",  # imported before the missing group is noticed
        b"\x80\x02\x95\x05\0\0\0\0\0\0\0I\\u0041\ncposix\nsystem\n)R.",  # half of a number that is none
    ],
)
def test_a_name_that_is_imported_before_a_fault(code: bytes) -> None:
    assert not unseen(code)

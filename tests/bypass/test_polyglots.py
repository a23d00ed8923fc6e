"""Files that are two: whatever another reader would take them for, they are refused as deceptive."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as safetensors_bytes

from hostile import Entry, Payload, archive
from unbackdoor.errors import UnsafeFile
from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.formats.other_readers import is_tar_header, taken_for
from unbackdoor.weights.formats.torch_save.checkpoints import begins_with_pickle
from unbackdoor.weights.formats.torch_save.pickle_reader import Trail
from unbackdoor.weights.formats.zip_archive import Archive
from unbackdoor.weights.read import read_contents, read_state

# Initialisers draw from the global generator here; it is put back.
pytestmark = pytest.mark.leaves_traces

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
CALL = b"cposix\nsystem\n(U\x04truetR"
HDF5 = b"\x89HDF\r\n\x1a\n"


def deceptive(path: Path, content: bytes, *loading: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UnsafeFile):
        read_state(path)
    found = inspect(path)
    assert found.loading in (loading or ("deceptive",))
    assert found.executes


# ---------------------------------------------------------------------------------------------------
# Every format with bytes of the author's choice in it


def as_safetensors(inner: bytes) -> bytes:
    return safetensors_bytes({"a": torch.frombuffer(bytearray(inner), dtype=torch.uint8)})


def as_zip(inner: bytes) -> bytes:
    held = io.BytesIO()
    torch.save({"a": torch.frombuffer(bytearray(inner), dtype=torch.uint8)}, held)
    return held.getvalue()


def as_older(inner: bytes) -> bytes:
    held = io.BytesIO()
    tensor = torch.frombuffer(bytearray(inner), dtype=torch.uint8)
    torch.save({"a": tensor}, held, _use_new_zipfile_serialization=False)
    return held.getvalue()


def as_pickle(inner: bytes) -> bytes:
    return pickle.dumps({"state_dict": {"a": torch.ones(2)}, "note": inner})


def as_tar(inner: bytes, *more: tuple[str, bytes], pax: bool = False) -> bytes:
    def dump(*values: object) -> bytes:
        return b"".join(pickle.dumps(value, protocol=2) for value in values)

    kind = b"\x80\x02(K\x07U\x03cpuctorch\nByteStorage\nt."
    storages = dump(1) + kind + struct.pack("<q", len(inner)) + inner + dump([])
    sizes = struct.pack("<2iqqq", 1, 0, len(inner), 1, 0)
    tensors = dump(1) + b"\x80\x02(K\x09K\x07ctorch\nByteTensor\nt." + sizes
    described = b"\x80\x02ccollections\nOrderedDict\n)RU\x01aU\x019Qs."
    out = io.BytesIO()
    form = tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, content in (("storages", storages), ("tensors", tensors), ("pickle", described), *more):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = 1.5 if pax else 1  # as the first releases wrote it, in a header of its own
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def as_onnx(inner: bytes) -> bytes:
    onnx = pytest.importorskip("onnx")
    weight = onnx.helper.make_tensor("a", onnx.TensorProto.UINT8, [len(inner)], inner, raw=True)
    graph = onnx.helper.make_graph([], "g", [], [], [weight])
    content: bytes = onnx.helper.make_model(graph).SerializeToString()
    return content


BASES: dict[str, Callable[[bytes], bytes]] = {
    "safetensors": as_safetensors, "zip": as_zip, "older": as_older, "pickle": as_pickle, "tar": as_tar,
    "onnx": as_onnx,
}  # fmt: skip


def hidden_zip() -> bytes:
    return archive([Entry(b"n/data.pkl", b"\x80\x02" + CALL + b".")])


@pytest.mark.parametrize("base", BASES)
def test_the_files_of_these_tests_are_read_where_they_hide_nothing(tmp_path: Path, base: str) -> None:
    (tmp_path / "m").write_bytes(BASES[base](bytes(range(200))))
    assert list(read_state(tmp_path / "m")) == ["a"]
    assert not inspect(tmp_path / "m").executes


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("block", [2048, 4096])
def test_an_hdf5_file_behind_a_block_of_anything(tmp_path: Path, base: str, block: int) -> None:
    content = BASES[base](b"@" * 5000)
    content = content[:block] + HDF5 + content[block + 8 :]
    deceptive(tmp_path / "m", content)


@pytest.mark.parametrize("base", ["safetensors", "older", "pickle", "tar", "onnx"])
@pytest.mark.parametrize("counted", [False, True])
def test_a_zip_file_at_the_end_of_anything(tmp_path: Path, base: str, counted: bool) -> None:
    # With and without counting what stands before it.
    hidden = hidden_zip()
    content = BASES[base](hidden)
    if counted:
        at = content.index(hidden)
        end = content.index(b"PK\x05\x06", at)
        (offset,) = struct.unpack_from("<L", content, end + 16)
        content = content[: end + 16] + struct.pack("<L", offset + at) + content[end + 20 :]
    if base == "safetensors":
        assert zipfile.ZipFile(io.BytesIO(content)).namelist() == ["n/data.pkl"]
    deceptive(tmp_path / "m", content)


def test_a_directory_in_64_bits_at_the_end_of_anything() -> None:
    hidden = hidden_zip()
    end = hidden.rindex(b"PK\x05\x06")
    count, size, offset = struct.unpack("<H2L", hidden[end + 10 : end + 20])
    large = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
    tail = bytearray(hidden[end:])
    struct.pack_into("<2H2L", tail, 8, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    hidden = hidden[:end] + large + struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1) + tail
    assert taken_for(as_safetensors(hidden), "safetensors") == ["zip"]


def test_marks_by_chance_are_no_second_file() -> None:
    assert taken_for(as_safetensors(b"PK\x05\x06" + b"\x55" * 40), "safetensors") == []
    assert taken_for(as_safetensors(HDF5 * 3), "safetensors") == []
    # Lengths of headers that are a whole pickle of a number: 11,912 is NEWTRUE and STOP.
    for length in (11912, 0x2E4E, 0x2E29, 0x2E5D, 0x2E7D):
        assert not begins_with_pickle(length.to_bytes(8, "little") + b"{}", Trail())


# ---------------------------------------------------------------------------------------------------
# Tar


def tar_header(name: bytes, size: int = 0) -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124:136] = b"0000644\0", b"%011o\0" % size
    block[156:157] = b"0"
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_a_tar_file_whose_first_name_is_a_pickle(tmp_path: Path) -> None:
    # Torch tries tar first, and its first names are whatever the author likes.
    whole = as_tar(b"@")
    for name in (b"\x80\x02}.", b"\x80\x02K\x01.", b"\x80\x04\x95"):
        content = tar_header(name) + whole
        tarfile.open(fileobj=io.BytesIO(content), mode="r:").close()
        deceptive(tmp_path / "m", content)
    # And the other way round: read as a pickle, the name is a call.
    deceptive(tmp_path / "m", tar_header(CALL + b".") + whole, "dangerous")


def test_a_tar_file_is_known_by_its_sum_as_for_torch(tmp_path: Path) -> None:
    assert is_tar_header(tar_header(b"storages"))
    assert not is_tar_header(tar_header(b"storages")[:-1] + b"x")
    assert not is_tar_header(bytes(512))
    assert not is_tar_header(tar_header(b"storages")[:100])
    signed = bytearray(tar_header(b"\xff\xff"))
    signed[148:156] = b"%06o\0 " % (int(bytes(signed[148:154]), 8) - 512)
    assert is_tar_header(bytes(signed))
    # Without the mark of the later form it is one too.
    whole = bytearray(as_tar(b"@"))
    whole[257:265] = bytes(8)
    whole[148:156] = b"        "
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    (tmp_path / "m").write_bytes(bytes(whole))
    assert read_contents(tmp_path / "m").format == "tar checkpoint"


def test_a_safetensors_file_that_is_a_tar_file(tmp_path: Path) -> None:
    # The first name is the length of the header; the header's text holds the numbers of a tar file.
    header = bytearray(b'{"__metadata__":{"x":"' + b" " * 1400 + b'"},"a":')
    header += b'{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    content = bytearray(len(header).to_bytes(8, "little") + header + bytes(4))
    content[124:136] = b"00000000000 "
    content[148:156] = b"        "
    content[148:156] = b"%06o  " % sum(content[:512])
    assert is_tar_header(bytes(content[:512]))
    deceptive(tmp_path / "m.safetensors", bytes(content))


def test_members_are_named_as_torch_names_them(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(as_tar(b"@", pax=True))
    assert list(read_state(tmp_path / "m")) == ["a"]
    # Another pickle under the name of the first, told in a header of its own: the last one counts.
    out = io.BytesIO(as_tar(b"@"))
    with tarfile.open(fileobj=out, mode="a", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("innocent")
        info.pax_headers, info.size = {"path": "pickle"}, 4
        tar.addfile(info, io.BytesIO(b"\x80\x02}."))
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        assert "pickle" in tar.getnames()[3:]
    deceptive(tmp_path / "m", out.getvalue())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_members_that_are_links(tmp_path: Path, kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("storages")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    deceptive(tmp_path / "m", out.getvalue())


def test_something_behind_the_end_of_a_tar_file(tmp_path: Path) -> None:
    whole = as_tar(b"@")
    deceptive(tmp_path / "m", whole + as_tar(b"#"))
    cut = whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512)
    deceptive(tmp_path / "m", cut + b"no header".ljust(512, b"x"))


# ---------------------------------------------------------------------------------------------------
# Pickle


def safetensors_as_pickle(code: bytes, distance: int) -> bytes:
    """Return a safetensors file that is a pickle as well: two texts that are thrown away, and the code.

    The length of the header ends in X, so that its other bytes are the length of the first text. That ends
    within the header, where the second begins, which only a line feed far behind in the weights ends.
    """
    length = (100 << 8) | ord("X")
    weights = b"@" * distance + b"\n0" + code
    header = b'{"__metadata__":{"x":"'.ljust(5 + 100 - 8, b"y") + b"0V"
    sizes = (len(weights), len(weights))
    header += b'"},"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % sizes
    return length.to_bytes(8, "little") + header.ljust(length) + weights


@pytest.mark.parametrize("distance", [10, 3 << 20])
@pytest.mark.parametrize(
    ("code", "loading"),
    [
        (CALL + b".", "dangerous"),
        (CALL, "dangerous"),
        (b"cmodels\nmake\n)R.", "deceptive"),
        (b"cmodels\nmake\n)R", "deceptive"),
        (b"ccollections\nOrderedDict\n)R.", "deceptive"),
        (b"]K\x01a.", "deceptive"),
        (MAGIC[2:], "deceptive"),  # with the parts of a checkpoint behind it, which need no call at all
    ],
)
def test_a_safetensors_file_that_is_a_pickle(
    tmp_path: Path, code: bytes, loading: str, distance: int
) -> None:
    deceptive(tmp_path / "m.safetensors", safetensors_as_pickle(code, distance), loading)


def test_a_safetensors_file_that_is_a_pickle_of_a_text_is_none(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(safetensors_as_pickle(b"K\x01.", 10))
    assert inspect(tmp_path / "m.safetensors").loading == "no code"


def test_a_checkpoint_behind_a_checkpoint(tmp_path: Path) -> None:
    # Torch leaves the file where the first one ends, and may be called again.
    first = as_older(b"@@@@")
    (tmp_path / "m").write_bytes(first + b"\x80\x02" + CALL + b".")
    assert inspect(tmp_path / "m").loading == "dangerous"


def test_a_zip_file_in_a_pickle(tmp_path: Path) -> None:
    inner = hidden_zip()
    outer = b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(inner)) + inner + b"\x85R."
    deceptive(tmp_path / "m", outer, "dangerous")


def test_an_array_of_objects_in_an_archive(tmp_path: Path) -> None:
    import numpy as np

    held = io.BytesIO()
    np.save(held, np.array([Payload(tmp_path / "executed")], dtype=object), allow_pickle=True)
    good = Entry(b"m/data.pkl", b"\x80\x02}.")
    deceptive(tmp_path / "m", archive([good, Entry(b"m/arr_0.npy", held.getvalue())]), "dangerous")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------------
# Compressed, and protocol buffers


def test_a_safetensors_file_that_a_reader_would_unpack(tmp_path: Path) -> None:
    # 1f 8b 08 is a length too.
    length = 0x00088B1F
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'.ljust(length)
    deceptive(tmp_path / "m.safetensors", length.to_bytes(8, "little") + header + bytes(4))
    assert taken_for(zlib.compress(b"anything"), "safetensors") == ["a zlib stream"]
    assert taken_for((0x178).to_bytes(8, "little") + b'{"a":', "safetensors") == []


def test_a_safetensors_file_that_is_a_model_of_onnx(tmp_path: Path) -> None:
    # 09 is a field of eight bytes, which are the rest of the length and the brace; the quotation mark behind
    # it is a text as long as the next letter says. Two more such texts lead to the weights.
    onnx = pytest.importorskip("onnx")
    model = as_onnx(b"####")
    name = b"a" + b"k" * ord("a") + b"zX" + b"k" * ord("X") + b"zI"
    header = b'{"' + name + b'":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(model), len(model))
    content = (0x0109).to_bytes(8, "little") + header.ljust(0x0109) + model
    assert [t.name for t in onnx.ModelProto.FromString(content).graph.initializer] == ["a"]
    deceptive(tmp_path / "m.safetensors", content)


def test_what_is_a_message_to_its_end() -> None:
    model = as_onnx(b"####")
    assert taken_for(model, "onnx") == []
    for content, found in (
        (model, ["onnx"]),
        (model + b"\0", []),
        (model[:-1], []),
        (b"\x0b\x08\x01\x0c" + model, ["onnx"]),  # a group, which is read and not known
        (b"\x0c" + model, []),
        (b"\x08" + b"\xff" * 11 + model, []),
        (b"\x0d1234" + model, ["onnx"]),
        (b"\x0f" + model, []),
    ):
        assert taken_for(content, "safetensors") == found


# ---------------------------------------------------------------------------------------------------
# Archives that two readers read differently


GOOD = [Entry(b"m/data.pkl", b"\x80\x02}."), Entry(b"m/version", b"3\n")]


def refused(content: bytes, words: str) -> None:
    with pytest.raises(UnsafeFile, match=words):
        Archive(content, "a test")


def test_a_second_end_in_a_comment_whose_length_is_wrong() -> None:
    # Ours skipped it because its own comment would end elsewhere; torch and Python take the last one.
    other = archive([*GOOD[:1], Entry(b"m/evil", b"x")])
    start = other.rindex(b"PK\x05\x06")
    for length in (0, 7, 0xFFFF):
        record = other[start : start + 20] + struct.pack("<H", length)
        both = archive([*GOOD, Entry(b"m/pad", other[:start])], comment=record + b"abc")
        refused(both, "two directories")


def test_bytes_that_no_directory_names() -> None:
    content = archive(GOOD)
    directory = content.index(b"PK\x01\x02")
    hidden = Entry(b"m/evil", b"\x80\x02" + CALL + b".")
    local = archive([hidden])[: 30 + 6 + len(hidden.data)]
    for at in (0, content.index(b"PK\x03\x04", 4), directory):
        moved = bytearray(content[:at] + local + content[at:])
        # The directory and its end count what was put in.
        position = directory + len(local)
        for _ in GOOD:
            (header,) = struct.unpack_from("<L", moved, position + 42)
            struct.pack_into("<L", moved, position + 42, header + (len(local) if header >= at else 0))
            (name_size,) = struct.unpack_from("<H", moved, position + 28)
            position += 46 + name_size
        struct.pack_into("<L", moved, position + 16, directory + len(local))
        assert len(zipfile.ZipFile(io.BytesIO(bytes(moved))).namelist()) == 2
        refused(bytes(moved), "does not name")


@pytest.mark.parametrize("form", ["<4s3L", "<4sL2Q", "<3L", "<L2Q"])
@pytest.mark.parametrize("lies", [False, True])
def test_what_may_stand_behind_an_entry(form: str, lies: bool) -> None:
    content = b"abcdefg"
    size = len(content) + lies
    values = (b"PK\x07\x08", zlib.crc32(content), size, size)
    behind = struct.pack(form, *values[0 if "4s" in form else 1 :])
    base = bytearray(archive([Entry(b"m/a", content, flags=0x808)]))
    directory = base.index(b"PK\x01\x02")
    struct.pack_into("<3L", base, 14, 0, 0, 0)
    out = base[:directory] + behind + base[directory:]
    end = out.rindex(b"PK\x05\x06")
    struct.pack_into("<L", out, end + 16, directory + len(behind))
    if lies:
        refused(bytes(out), "does not name")
    else:
        assert list(Archive(bytes(out), "a test").entries) == ["m/a"]


@pytest.mark.parametrize(
    "entry",
    [
        Entry(b"m/\x82", flags=0),  # an accent in one code page, another letter in others
        Entry("m/é".encode(), flags=0),
        Entry(b"m/\xff", flags=0x800),
        Entry(b"m/a", flags=0x2800),
        Entry(b"m/a", flags=0x820),
        Entry(b"m/a/", b"content"),
    ],
)
def test_entries_that_are_named_or_kept_in_several_ways(entry: Entry) -> None:
    refused(archive([*GOOD, entry]), "several ways|unknown kind|has content")


def test_a_second_name_in_an_extra_field() -> None:
    content = bytearray(archive([Entry(b"m/a", b"abc")]))
    at = content.index(b"PK\x01\x02")
    for other in (b"m/b", b"m/a"):
        field = struct.pack("<2HBL", 0x7075, 5 + len(other), 1, zlib.crc32(b"m/a")) + other
        changed = bytearray(content)
        changed[at + 46 + 3 : at + 46 + 3] = field
        struct.pack_into("<H", changed, at + 30, len(field))
        end = changed.rindex(b"PK\x05\x06")
        struct.pack_into("<L", changed, end + 12, 46 + 3 + len(field))
        if other == b"m/b":
            refused(bytes(changed), "two names")
        else:
            assert list(Archive(bytes(changed), "a test").entries) == ["m/a"]


def test_something_behind_packed_content() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(b"abc" * 50) + packer.flush() + b"hidden"
    base = archive([Entry(b"m/a", packed, size=150)])
    # Stored is 0, deflated 8: in both headers.
    content = bytearray(base)
    struct.pack_into("<H", content, 8, 8)
    struct.pack_into("<H", content, content.index(b"PK\x01\x02") + 10, 8)
    read = Archive(bytes(content), "a test")
    with pytest.raises(UnsafeFile, match="another size"):
        read.content(read.entries["m/a"], 1000)

"""The tar reader: what others write is read as by `tarfile`; what is damaged or cut short never passes for whole."""

from __future__ import annotations

import io
import tarfile

import pytest
import webdataset
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.data.ustar import BLOCK, MAX_MEMBER_BYTES, TarError, members

URI = "s3://bucket/shard.tar"
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)

name_parts = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cs", "Cc")), min_size=1, max_size=60
).filter(lambda part: part not in (".", ".."))
names = st.lists(name_parts, min_size=1, max_size=6).map("/".join)


def tar_of(files: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, encoding="utf-8") as archive:
        for name, body in files:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def read(data: bytes) -> list[tuple[str, bytes]]:
    return [(member.name, member.body) for member in members(io.BytesIO(data), URI)]


def by_tarfile(data: bytes) -> list[tuple[str, bytes, int]]:
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as archive:
        return [(member.name, archive.extractfile(member).read(), member.offset) for member in archive]


def seal(data: bytearray, header: int = 0) -> bytes:
    """Make the checksum of a header fit it again."""
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + BLOCK])
    return bytes(data)


@given(
    files=st.lists(st.tuples(names, st.binary(max_size=1500)), min_size=1, max_size=5),
    tar_format=st.sampled_from(FORMATS),
)
@example(files=[("a" * 100, b"x"), ("b" * 101, b"y" * 512), ("d" * 99 + "/" + "c" * 100, b"")], tar_format=FORMATS[2])
@example(files=[("ä" * 50, b"x"), ("d" * 150 + "/" + "e" * 99, b"z")], tar_format=FORMATS[0])
def test_what_tarfile_writes_is_read_as_tarfile_reads_it(files, tar_format):
    try:
        data = tar_of(files, tar_format)
    except ValueError:  # USTAR has no room for the name
        assert tar_format == tarfile.USTAR_FORMAT
        return
    assert read(data) == files
    assert read(data) == [(name, body) for name, body, _ in by_tarfile(data)]


@given(
    keys=st.lists(st.text("abcäé/_-", min_size=1, max_size=160), min_size=1, max_size=5, unique=True),
    image=st.binary(max_size=2000),
)
def test_what_webdataset_writes_is_read_as_tarfile_reads_it(keys, image):
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as writer:
        for key in keys:
            writer.write({"__key__": key, "jpg": image, "cls": b"7"})
    data = buffer.getvalue()
    assert read(data) == [(name, body) for name, body, _ in by_tarfile(data)]
    assert len(read(data)) == 2 * len(keys)


def test_the_offset_is_that_of_a_files_own_header():
    data = tar_of([("a", b"1" * 600), ("b", b"2"), ("c", b"")])
    assert [member.offset for member in members(io.BytesIO(data), URI)] == [0, 1536, 2560]
    assert [offset for *_, offset in by_tarfile(data)] == [0, 1536, 2560]


SMALL = [("a/1.jpg", b"\xff\xd8" + b"i" * 700), ("k" * 90 + "/" + "k" * 30 + ".cls", b"12"), ("b/2.jpg", b"x" * 512)]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_cut_short_at_any_byte_is_refused(tar_format):
    data = tar_of(SMALL, tar_format)
    mark = data.rindex(b"x") // BLOCK * BLOCK + BLOCK
    assert data[mark:].count(0) == len(data) - mark
    for end in range(mark + BLOCK):
        with pytest.raises(TarError, match=r"^s3://bucket/shard\.tar: (byte \d+: truncated: |empty)"):
            read(data[:end])
    for end in range(mark + BLOCK, len(data) + 1):
        assert read(data[:end]) == SMALL


def test_a_truncation_names_the_byte_at_which_the_file_ends():
    data = tar_of(SMALL)[: 512 + 300]
    with pytest.raises(TarError, match=r"byte 812: truncated: it ends inside the member at byte 0"):
        read(data)
    with pytest.raises(TarError, match=r"byte 1219: truncated: it ends inside the member at byte 0"):
        read(tar_of(SMALL)[:1219])  # the body is whole, its padding is not
    with pytest.raises(TarError, match=r"byte 1636: truncated: it ends inside the header at byte 1536"):
        read(tar_of(SMALL)[:1636])
    with pytest.raises(TarError, match=r"byte 1536: truncated: it ends without its end mark"):
        read(tar_of(SMALL)[:1536])


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_flipped_byte_of_every_header_is_refused(tar_format):
    whole = tar_of(SMALL, tar_format)
    headers = [at for at in range(0, len(whole), BLOCK) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 4
    for header in headers:
        for place in range(header, header + BLOCK):
            for flip in (0x01, 0x10, 0x80, 0xFF):
                data = bytearray(whole)
                data[place] ^= flip
                if (
                    148 <= place - header < 156
                ):  # the checksum's own field: another way to write the same number is fine
                    try:
                        assert read(bytes(data)) == SMALL
                    except TarError:
                        continue
                else:
                    with pytest.raises(TarError, match=rf"byte {header}: (damaged header|not a tar header)"):
                        read(bytes(data))


@given(place=st.integers(0, 4 * BLOCK - 1), value=st.binary(min_size=1, max_size=40))
def test_damage_is_a_tar_error_or_shows_in_bodies_alone(place, value):
    data = bytearray(tar_of(SMALL))
    data[place : place + len(value)] = value
    try:
        found = read(bytes(data))
    except TarError as error:
        message, found = str(error), SMALL
    else:
        message = f"{URI}: "
    assert message.startswith(f"{URI}: ")
    assert [(name, len(body)) for name, body in found] == [(name, len(body)) for name, body in SMALL]


def test_zeros_may_follow_the_end_mark_and_nothing_else():
    data = tar_of(SMALL)
    mark = data.rindex(b"x") // BLOCK * BLOCK + BLOCK
    assert read(data[: mark + BLOCK]) == SMALL
    assert read(data + bytes(3_000_001)) == SMALL
    with pytest.raises(TarError, match=rf"byte {len(data) + 2_000_000}: b'more' after the end mark at byte {mark}"):
        read(data + bytes(2_000_000) + b"more")
    with pytest.raises(TarError, match=rf"byte {len(data)}: .* after the end mark"):
        read(data + data)  # the second archive would be lost


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "empty"), (bytes(10240), "an archive without members"), (bytes(100), "byte 100: truncated")],
)
def test_an_archive_that_holds_nothing_is_refused(data, message):
    with pytest.raises(TarError, match=rf"^s3://bucket/shard\.tar: {message}"):
        read(data)


@pytest.mark.parametrize("data", [b"x" * 2000, b"PK\x03\x04" + b"\0" * 600, b"\x1f\x8b" * 600, b"<html>" * 300])
def test_what_is_no_tar_is_refused(data):
    with pytest.raises(TarError, match=r"byte 0: not a tar header"):
        read(data)


def test_a_header_without_ustars_mark_is_refused_though_its_checksum_fits():
    data = bytearray(tar_of(SMALL))
    data[257:265] = bytes(8)  # as the tar of the seventies, where these bytes mean nothing
    with pytest.raises(TarError, match=r"byte 0: not a tar header"):
        read(seal(data))


def special(name: str, kind: bytes, tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "target" if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
        archive.addfile(member)
        after = tarfile.TarInfo("after.jpg")
        after.size = 3
        archive.addfile(after, io.BytesIO(b"abc"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]
)
@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("name", ["d", "f" * 90 + "/" + "g" * 60])
def test_folders_devices_and_links_are_passed_over(kind, tar_format, name):
    assert read(special(name, kind, tar_format)) == [("after.jpg", b"abc")]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("name", ["a.jpg", "f" * 130])
def test_links_are_told(kind, name):
    links: list[str] = []
    assert len(list(members(io.BytesIO(special(name, kind)), URI, links.append))) == 1
    assert links == [name]
    assert list(members(io.BytesIO(special("folder", tarfile.DIRTYPE)), URI, links.append))
    assert links == [name]


def test_a_folders_size_field_says_nothing_of_a_body():
    data = bytearray(special("d", tarfile.DIRTYPE))
    data[124:136] = b"00000010000\0"
    assert read(seal(data)) == [("after.jpg", b"abc")]


@pytest.mark.parametrize("kind", [b"S", b"M", b"V", b"Z"])
def test_a_member_of_an_unknown_kind_is_refused(kind):
    data = bytearray(tar_of(SMALL))
    data[156:157] = kind
    with pytest.raises(TarError, match=rf"byte 0: a member of type '{kind.decode()}'"):
        read(seal(data))


@pytest.mark.parametrize("kind", [b"\0", b"7"])
def test_other_kinds_of_plain_files_are_read(kind):
    data = bytearray(tar_of(SMALL))
    data[156:157] = kind
    assert read(seal(data)) == SMALL


def test_sizes_in_base_256_are_read():
    data = bytearray(tar_of(SMALL))
    data[124:136] = b"\x80" + (702).to_bytes(11, "big")
    assert read(seal(data)) == SMALL


@pytest.mark.parametrize(
    "size",
    [
        b"\x80" + (MAX_MEMBER_BYTES + 1).to_bytes(11, "big"),
        b"\xff" * 12,
        b"77777777777\0",
        b"0000000000x\0",
        b"-0000000001\0",
    ],
)
def test_a_size_that_cannot_be_is_refused(size):
    data = bytearray(tar_of(SMALL))
    data[124:136] = size
    with pytest.raises(TarError, match=r"byte 0: 'a/1\.jpg' has a size of .*; up to 1073741824 bytes are read"):
        read(seal(data))


def test_a_large_member_is_read_in_pieces_and_its_truncation_found():
    body = bytes(range(256)) * (80 << 10)  # 20 MiB
    data = tar_of([("large.jpg", body), ("b", b"2")])
    assert read(data) == [("large.jpg", body), ("b", b"2")]
    with pytest.raises(TarError, match=r"byte 17000000: truncated: it ends inside the member at byte 0"):
        read(data[:17_000_000])


def with_pax(headers: dict[str, str], size: int | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("short.jpg")
        member.size, member.pax_headers = 5, headers
        archive.addfile(member, io.BytesIO(b"12345"))
    data = bytearray(buffer.getvalue())
    if size is not None:
        header = 2 * BLOCK
        data[header + 124 : header + 136] = b"%011o\0" % size
        return seal(data, header)
    return bytes(data)


def test_pax_says_path_and_size():
    assert read(with_pax({"path": "long/ä.jpg", "comment": "x=y\nz", "size": "5"}, size=0)) == [
        ("long/ä.jpg", b"12345")
    ]
    assert read(with_pax({"comment": "x"})) == [("short.jpg", b"12345")]


def test_what_pax_says_holds_for_one_member():
    first = with_pax({"path": "p.jpg", "size": "5"})
    data = first[: 4 * BLOCK] + tar_of([("q.jpg", b"123456789")])
    assert read(data) == [("p.jpg", b"12345"), ("q.jpg", b"123456789")]


@pytest.mark.parametrize("size", ["x", "-5", "5.0"])
def test_a_pax_size_that_is_none_is_refused(size):
    with pytest.raises(TarError, match=r"byte 0: a damaged PAX header: .* is not a size"):
        read(with_pax({"size": size}))


def test_sparse_files_are_refused():
    with pytest.raises(TarError, match=r"byte 0: a sparse file"):
        read(with_pax({"GNU.sparse.major": "1", "GNU.sparse.realsize": "100"}))


def test_pax_headers_of_all_members_may_not_name_them():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "abc"}) as archive:
        archive.addfile(tarfile.TarInfo("a"), io.BytesIO())
    assert read(buffer.getvalue()) == [("a", b"")]
    data = buffer.getvalue().replace(b"15 comment=abc\n", b"12 path=abc\n\0\0\0").replace(b"0000017\0", b"0000014\0")
    with pytest.raises(TarError, match=r"byte 0: a PAX header that gives all members one path or size"):
        read(seal(bytearray(data)))


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    "record", [b"0 path=x\n", b"x path=x\n", b"-3 path=x\n", b"12 other=1\n0 p=q\n", b"99 path=x\n"]
)
def test_a_damaged_pax_record_is_refused(record):
    data = bytearray(with_pax({"path": "long.jpg"}))
    data[124:136] = b"%011o\0" % len(record)
    data[BLOCK : 2 * BLOCK] = record.ljust(BLOCK, b"\0")
    with pytest.raises(TarError, match=r"byte 0: a damaged PAX header"):
        read(seal(data))


def test_a_long_name_without_its_file_is_refused():
    data = tar_of([("n" * 150, b"x")], tarfile.GNU_FORMAT)
    with pytest.raises(TarError, match=r"byte 1024: truncated: a name or size is announced"):
        read(data[: 2 * BLOCK] + bytes(2 * BLOCK))


def test_names_that_are_not_utf8_stay_apart():
    found = []
    for byte in (b"\xb0", b"\xb1"):
        data = bytearray(tar_of([("x.jpg", b"1")]))
        data[0:1] = byte
        found.append(read(seal(data))[0][0])
    assert found == [r"\xb0.jpg", r"\xb1.jpg"]


def test_times_in_gnus_own_header_are_no_part_of_the_name():
    data = bytearray(tar_of([("x.jpg", b"1")], tarfile.GNU_FORMAT))
    data[345:357] = b"14000000000\0"
    assert read(seal(data)) == [("x.jpg", b"1")]


def test_nothing_is_read_beyond_what_is_asked_for():
    # A stream from a store: one body, its header and the next are in memory, not the archive.
    class Counting(io.BytesIO):
        asked = 0

        def read(self, num_bytes: int | None = -1) -> bytes:
            assert num_bytes is not None
            assert num_bytes >= 0
            self.asked = max(self.asked, num_bytes)
            return super().read(num_bytes)

    stream = Counting(tar_of([(f"{i}.jpg", b"x" * 5000) for i in range(50)]))
    next(members(stream, URI))
    assert stream.tell() == BLOCK + 5120 + BLOCK
    assert stream.asked == 5120 + BLOCK

"""Zips and tars of folders of images by person, as WebFace is given out: members ``.../<identity>/<image>``."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NamedTuple, cast

from pipeline import storage
from pipeline.data.sources.base import Part, Place, RawSample, SourceError, SourceSpec, cut
from pipeline.data.sources.files import IMAGE_EXTENSIONS, extension, files_at, folder_of, is_beside, look_through
from pipeline.data.ustar import MAX_MEMBER_BYTES, TarError, members

EXTENSIONS: Final = frozenset({"zip", "tar", "tar.gz", "tgz"})

_LOCAL_HEADER: Final = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, lengths of name and extra field
_END_BYTES: Final = 22  # of the record that ends a zip, without its comment
_LARGE_END_BYTES: Final = 56 + 20  # of that of large zips and of its locator
_ENCRYPTED, _NAME_IS_UTF8 = 0x1, 0x800


class _Entry(NamedTuple):
    """A member of a zip as the directory at its end says."""

    name: str
    offset: int
    packed_bytes: int
    num_bytes: int
    crc32: int
    method: int


def _is_image(name: str, uri: str) -> bool:
    """Whether a member is an image; False: a note or list beside them.

    Raises:
        SourceError: It is neither, or an image in no folder.
    """
    if is_beside(name):
        return False
    if extension(name) not in IMAGE_EXTENSIONS:
        raise SourceError(
            f"{uri}: {name}: neither an image ({', '.join(sorted(IMAGE_EXTENSIONS))}) nor a note or list beside them"
        )
    if folder_of(name) in ("", ".", ".."):
        raise SourceError(f"{uri}: {name}: an image in no folder: whose is it? Expected: .../<identity>/<image>")
    return True


def _zip_entries(uri: str) -> list[_Entry]:
    """The images of a zip, in the order in which they lie in it."""
    archive_bytes = storage.size(uri)
    with storage.open_read(uri) as stream:
        try:
            with zipfile.ZipFile(cast(BinaryIO, stream)) as archive:
                infos = archive.infolist()
                announced = _announced(stream, len(archive.comment))
        except storage.StorageError:
            raise
        # The last four escape zipfile on damaged directories.
        except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError, ValueError) as error:
            raise SourceError(f"{uri}: a damaged zip, its directory cannot be read: {error}") from error
    # zipfile takes what it finds: one damaged length, and members are lost. Old writers count modulo 2**16.
    if announced not in (len(infos), len(infos) % 2**16):
        raise SourceError(f"{uri}: damaged: {len(infos)} members found, {announced} are announced")
    entries = [_entry(info, uri, archive_bytes) for info in infos if _is_image_entry(info, uri)]
    if not entries:
        raise SourceError(f"{uri}: holds no images")
    return sorted(entries, key=lambda entry: entry.offset)


def _announced(stream: io.BufferedIOBase, comment_bytes: int) -> int:
    """How many members the end of a zip says there are: in its last record, or in that of large zips before it."""
    stream.seek(max(0, stream.seek(0, io.SEEK_END) - comment_bytes - _END_BYTES - _LARGE_END_BYTES))
    end = stream.read(_LARGE_END_BYTES + _END_BYTES)
    if end[:4] == b"PK\6\6" and end[_LARGE_END_BYTES - 20 :][:4] == b"PK\6\7":
        return int.from_bytes(end[32:40], "little")
    return int.from_bytes(end[-_END_BYTES + 10 : -_END_BYTES + 12], "little")


def _is_image_entry(info: zipfile.ZipInfo, uri: str) -> bool:
    if not info.is_dir():
        return _is_image(info.orig_filename, uri)
    if info.file_size:
        raise SourceError(f"{uri}: {info.orig_filename}: damaged: a folder of {info.file_size} bytes")
    return False


def _entry(info: zipfile.ZipInfo, uri: str, archive_bytes: int) -> _Entry:
    place = f"{uri}: {info.orig_filename}"
    if info.flag_bits & _ENCRYPTED:
        raise SourceError(f"{place}: encrypted; only plain zips are read")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SourceError(f"{place}: compressed by method {info.compress_type}; 0 and 8 (deflate) are read")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise SourceError(f"{place}: a link, not an image")
    if not 0 <= info.header_offset < archive_bytes - info.compress_size or info.file_size > MAX_MEMBER_BYTES:
        raise SourceError(
            f"{place}: damaged: {info.compress_size} bytes at byte {info.header_offset} of {archive_bytes}, "
            f"{info.file_size} unpacked"
        )
    return _Entry(
        info.orig_filename, info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _ZipRun:
    """Members of one zip. They carry their places: zipfile would read the whole directory again for every part."""

    uri: str
    entries: tuple[_Entry, ...]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    def samples(self) -> Iterator[RawSample]:
        with storage.open_read(self.uri) as stream:
            for entry in self.entries:
                name = f"{self.uri}: {entry.name}"
                yield RawSample(name, folder_of(entry.name), _read_entry(stream, entry, name))


def _read_entry(stream: io.BufferedIOBase, entry: _Entry, name: str) -> bytes:
    """Read and check one member: name, size and CRC-32 as the directory has them."""
    place = f"{name}: byte {entry.offset}"
    stream.seek(entry.offset)
    header = stream.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size:
        raise SourceError(f"{place}: truncated")
    signature, flags, method, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    local_name = stream.read(name_bytes + extra_bytes)[:name_bytes]
    if signature != b"PK\3\4":
        raise SourceError(f"{place}: damaged: no member starts here")
    local = local_name.decode("utf-8" if flags & _NAME_IS_UTF8 else "cp437", errors="backslashreplace")
    if local != entry.name or method != entry.method:
        raise SourceError(f"{place}: damaged: the member itself says {local!r}, method {method}")
    packed = stream.read(entry.packed_bytes)
    if len(packed) < entry.packed_bytes:
        raise SourceError(f"{place}: truncated: {len(packed)} of {entry.packed_bytes} bytes")
    image = packed
    if method == zipfile.ZIP_DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            image = inflate.decompress(packed, entry.num_bytes + 1)  # no more, whatever it would swell to
        except zlib.error as error:
            raise SourceError(f"{place}: damaged: {error}") from error
    if len(image) != entry.num_bytes:
        raise SourceError(f"{place}: damaged: {len(image)} bytes, the directory says {entry.num_bytes}")
    if (found := zlib.crc32(image)) != entry.crc32:
        raise SourceError(f"{place}: damaged: crc32 is {found:08x}, the directory says {entry.crc32:08x}")
    return image


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tar:
    uri: str
    num_bytes: int

    def samples(self) -> Iterator[RawSample]:
        with storage.open_read(self.uri) as file:
            stream = cast(BinaryIO, file)
            if extension(self.uri) != "tar":
                stream = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=stream)), 1 << 20))
            try:
                yield from self._images(stream)
            except TarError as error:
                raise SourceError(str(error)) from error
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise SourceError(f"{self.uri}: before byte {file.tell()}: damaged gzip: {error}") from error

    def _images(self, stream: BinaryIO) -> Iterator[RawSample]:
        num_images = 0
        for name, body, _ in members(stream, self.uri, on_link=self._refuse_image):
            if _is_image(name, self.uri):
                num_images += 1
                yield RawSample(f"{self.uri}: {name}", folder_of(name), body)
        if not num_images:
            raise SourceError(f"{self.uri}: holds no images")

    def _refuse_image(self, link: str) -> None:
        if extension(link) in IMAGE_EXTENSIONS and not is_beside(link):
            raise SourceError(
                f"{self.uri}: {link}: a link, not an image; pack the archive with tar --hard-dereference -h"
            )


class ArchiveSource:
    """One zip, tar or tar.gz, or a folder of them; an identity is the name of the folder directly above its images.

    Notes and lists beside the images are passed over; any other member is an error.
    """

    def __init__(self, spec: SourceSpec) -> None:
        self._listing = look_through(spec.uri, EXTENSIONS, "archives")

    @staticmethod
    def recognises(place: Place) -> bool:
        """Zips and tars, by their names."""
        return bool(files_at(place, EXTENSIONS))

    def parts(self, part_bytes: int) -> list[Part]:
        """Whole tars, which can only be read from the front; runs of a zip's members.

        Raises:
            SourceError: A zip's directory is damaged, or a member is none that can be read.
        """
        parts: list[Part] = []
        for name, num_bytes in zip(self._listing.names, self._listing.sizes, strict=True):
            uri = self._listing.uri(name)
            if extension(name) != "zip":
                parts.append(_Tar(uri=uri, num_bytes=num_bytes))
                continue
            entries = _zip_entries(uri)
            runs = cut([entry.num_bytes for entry in entries], part_bytes)
            parts.extend(_ZipRun(uri=uri, entries=tuple(entries[run.start : run.stop])) for run in runs)
        return parts

    def version(self) -> dict[str, Any]:
        """Names, sizes and times of change of the archives."""
        return {"files": self._listing.digest}

    def describe(self) -> dict[str, Any]:
        """Number and size of the archives."""
        return {
            "format": "archives",
            "num_files": len(self._listing.names),
            "num_bytes": sum(self._listing.sizes),
            "num_other_files": self._listing.num_others,
        }

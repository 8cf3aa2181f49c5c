"""List files: a text file with the path of an image and its identity on every line."""

from __future__ import annotations

import hashlib
import io
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple

from pipeline import storage
from pipeline.data.sources.base import Part, Place, RawSample, SourceError, SourceSpec, cut, file_versions
from pipeline.data.sources.files import Wanted, class_name, extension, read_ahead
from pipeline.data.sources.list_form import EXPECTED, Form, find_form

EXTENSIONS: Final = frozenset({"txt", "lst", "csv", "tsv"})

_LINES_LOOKED_AT: Final = 100
_MAX_LINE_BYTES: Final = 1 << 16
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
# Where every 64th image's line starts is remembered: parts are ranges of the list, not copies of it.
_STRIDE: Final = 64
_SIZES_LOOKED_AT: Final = 8


class _Line(NamedTuple):
    number: int
    start: int
    text: str


class _Entry(NamedTuple):
    line: int
    start: int
    path: str
    label: str


def _lines(raw_lines: Iterable[bytes], uri: str, number: int = 1, start: int = 0) -> Iterator[_Line]:
    """Lines that are not blank, with their numbers (from 1) and first bytes."""
    for raw in raw_lines:
        body = raw.removeprefix(_BYTE_ORDER_MARK) if start == 0 else raw
        if len(raw) >= _MAX_LINE_BYTES or b"\0" in raw:
            raise SourceError(f"{uri}: line {number}: not a line of text; expected: {EXPECTED}")
        try:
            text = body.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise SourceError(f"{uri}: line {number}: not UTF-8: {error}") from error
        if text.strip():
            yield _Line(number, start, text)
        number, start = number + 1, start + len(raw)


def _entries(lines: Iterable[_Line], form: Form, uri: str) -> Iterator[_Entry]:
    for line in lines:
        try:
            path, label = form.read(line.text)
        except ValueError as error:
            raise SourceError(
                f"{uri}: line {line.number}: {line.text[:200]!r}: {error}; expected, as before: {form.expected}"
            ) from error
        yield _Entry(line.number, line.start, path, class_name(label, f"{uri}: line {line.number}"))


def _image_uri(root: str, path: str) -> str:
    return storage.normalise(path) if path.startswith("/") or "://" in path else storage.join(root, path)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Images:
    """Lines of a list: bytes ``start`` to ``end``, the first of which is line ``first_line``."""

    uri: str
    root: str
    form: Form
    start: int
    end: int
    first_line: int
    num_bytes: int

    def entries(self) -> Iterator[_Entry]:
        data = storage.read_range(self.uri, self.start, self.end - self.start)
        lines = _lines(io.BytesIO(data), self.uri, self.first_line, self.start)
        return _entries(lines, self.form, self.uri)

    def samples(self) -> Iterator[RawSample]:
        for_reading = ((_image_uri(self.root, entry.path), entry) for entry in self.entries())
        return read_ahead(
            Wanted(uri, entry.label, f"{self.uri}: line {entry.line}: {uri}") for uri, entry in for_reading
        )


class ListSource:
    """Images named by a list file. How its lines are laid out is found from the first ones, and holds for all.

    Opening reads the list and checks every line. Of the images only a few are looked at: `version` knows where they lie
    and the sizes and times of these few.
    """

    def __init__(self, spec: SourceSpec) -> None:
        self._uri = storage.normalise(spec.uri)
        self._root = storage.normalise(spec.root) if spec.root else self._uri.rpartition("/")[0]
        self._form = _find_form(self._uri)
        # Of every 64th image's line: its first byte and its number.
        self._starts, self._numbers = array("q"), array("q")
        self._num_images = self._num_bytes = 0
        self._sha256 = self._read()
        if not self._num_images:
            raise SourceError(f"{self._uri}: names no image; expected on each line: {EXPECTED}")

    def _read(self) -> str:
        """Check every line; gives the SHA-256 (hex) of the list."""
        digest = hashlib.sha256()

        def raw_lines() -> Iterator[bytes]:
            for raw in _raw_lines(self._uri):
                digest.update(raw)
                self._num_bytes += len(raw)
                yield raw

        lines = islice(_lines(raw_lines(), self._uri), int(self._form.has_header), None)
        for entry in _entries(lines, self._form, self._uri):
            if self._num_images % _STRIDE == 0:
                self._starts.append(entry.start)
                self._numbers.append(entry.line)
            self._num_images += 1
        return digest.hexdigest()

    @staticmethod
    def recognises(place: Place) -> bool:
        """One text file."""
        return place.is_file and extension(place.uri) in EXTENSIONS

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of the list; the sizes of the images are guessed from a few of them.

        Raises:
            SourceError: One of these few is not there.
        """
        counts = [_STRIDE] * len(self._starts)
        counts[-1] -= -self._num_images % _STRIDE
        ends = [*self._starts[1:], self._num_bytes]
        some = self._some_images()
        image_bytes = max(1, sum(info.num_bytes for info in some) // len(some))
        return [
            _Images(
                uri=self._uri,
                root=self._root,
                form=self._form,
                start=self._starts[run.start],
                end=ends[run.stop - 1],
                first_line=self._numbers[run.start],
                num_bytes=sum(counts[run.start : run.stop]) * image_bytes,
            )
            for run in cut([count * image_bytes for count in counts], part_bytes)
        ]

    def _some_images(self) -> list[storage.FileInfo]:
        ends = [*self._starts[1:], self._num_bytes]
        places = range(0, len(self._starts), -(-len(self._starts) // _SIZES_LOOKED_AT))
        found = []
        for place in places:
            start = self._starts[place]
            raw = io.BytesIO(storage.read_range(self._uri, start, ends[place] - start))
            lines = _lines(raw, self._uri, self._numbers[place], start)
            entry = next(_entries(lines, self._form, self._uri))
            image = _image_uri(self._root, entry.path)
            try:
                found.append(storage.file_info(image))
            except storage.MissingError as error:
                raise SourceError(
                    f"{self._uri}: line {entry.line}: {image}: does not exist; paths are taken from {self._root}"
                ) from error
        return found

    def version(self) -> dict[str, Any]:
        """The list's contents, where its paths begin, and a few of the images: not each of them is looked at."""
        return {"sha256": self._sha256, "root": self._root, "images": file_versions(self._some_images())}

    def describe(self) -> dict[str, Any]:
        """The list's contents and length."""
        return {"format": "list", "num_files": self._num_images, "sha256": self._sha256}


def _raw_lines(uri: str) -> Iterator[bytes]:
    with storage.open_read(uri) as stream:
        while raw := stream.readline(_MAX_LINE_BYTES):
            yield raw


def _find_form(uri: str) -> Form:
    lines = list(islice(_lines(_raw_lines(uri), uri), _LINES_LOOKED_AT))
    if not lines:
        raise SourceError(f"{uri}: names no image; expected on each line: {EXPECTED}")
    try:
        form = find_form([line.text for line in lines])
    except ValueError as error:
        raise SourceError(f"{uri}: line {lines[0].number}: {error}") from error
    if form is None:
        raise SourceError(f"{uri}: line {lines[0].number}: {lines[0].text[:200]!r}; expected: {EXPECTED}")
    return form

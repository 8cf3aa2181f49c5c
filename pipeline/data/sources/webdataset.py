"""WebDataset shards that others have written: tars of ``<key>.jpg`` and ``<key>.cls`` (or ``.json``, ``.txt``)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, BinaryIO, Final, cast

from pipeline import storage
from pipeline.data.shards import IMAGE_EXTENSIONS, LABEL_EXTENSION, split_key
from pipeline.data.sources.base import Part, Place, RawSample, SourceError, SourceSpec
from pipeline.data.sources.files import class_name, files_at, is_beside, look_through
from pipeline.data.ustar import Member, TarError, members

EXTENSIONS: Final = frozenset({"tar"})
LABEL_FIELDS: Final = ("label", "identity", "cls")

_MEMBERS_LOOKED_AT: Final = 16
_EXPECTED: Final = (
    f"an image (.{', .'.join(IMAGE_EXTENSIONS)}) and a label: .cls, .json with one of the fields "
    f"{', '.join(LABEL_FIELDS)}, or .txt with a number or a name"
)


def _samples(stream: BinaryIO, uri: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and fields (by extension) of each sample: neighbours that share a key, as WebDataset has it."""
    for key, group in groupby(_keyed(members(stream, uri), uri), key=lambda item: item[0]):
        fields: dict[str, bytes] = {}
        for _, field, body in group:
            if field in fields:
                raise SourceError(f"{uri}: the sample {key!r} has two members .{field}")
            fields[field] = body
        yield key, fields


def _keyed(found: Iterable[Member], uri: str) -> Iterator[tuple[str, str, bytes]]:
    for name, body, offset in found:
        key, field = split_key(name)
        if field:
            yield key, field, body
        elif not is_beside(name):
            raise SourceError(f"{uri}: byte {offset}: {name}: no member of a sample; expected: <key>.<extension>")


def _image(fields: dict[str, bytes], place: str) -> bytes:
    images = [field for field in fields if field in IMAGE_EXTENSIONS]
    if len(images) != 1:
        found = ", ".join(f".{field}" for field in fields)
        raise SourceError(f"{place}: {len(images) or 'no'} images among its members {found}; expected: {_EXPECTED}")
    return fields[images[0]]


def _identity(fields: dict[str, bytes], place: str) -> str:
    if LABEL_EXTENSION in fields:
        return _text(fields[LABEL_EXTENSION], f"{place}.cls")
    if "json" in fields:
        identity = _identity_in_json(fields["json"], f"{place}.json")
        if identity:
            return identity
    if "txt" in fields:
        return _text(fields["txt"], f"{place}.txt")
    found = ", ".join(f".{field}" for field in fields)
    raise SourceError(f"{place}: no label among its members {found}; expected: {_EXPECTED}")


def _text(body: bytes, place: str) -> str:
    try:
        text = class_name(body.decode(), place)
    except UnicodeDecodeError as error:
        raise SourceError(f"{place}: {body[:20]!r} is not UTF-8") from error
    if not text or "\n" in text:
        raise SourceError(f"{place}: {text[:40]!r} is not a class number or a name")
    return text


def _identity_in_json(body: bytes, place: str) -> str:
    """The label in a JSON object; "" if it has no such field."""
    try:
        content = json.loads(body)
    except ValueError as error:
        raise SourceError(f"{place}: not JSON: {error}") from error
    field = next((name for name in LABEL_FIELDS if name in content), None) if isinstance(content, dict) else None
    if field is None:
        return ""
    value = content[field]
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not class_name(str(value), place):
        raise SourceError(f"{place}: {field} is {value!r}, expected: a class number or a name")
    return class_name(str(value), place)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    uri: str
    num_bytes: int

    def samples(self) -> Iterator[RawSample]:
        num_samples = 0
        with storage.open_read(self.uri) as stream:
            try:
                for key, fields in _samples(cast(BinaryIO, stream), self.uri):
                    place = f"{self.uri}: {key}"
                    num_samples += 1
                    yield RawSample(place, _identity(fields, place), _image(fields, place))
            except TarError as error:
                raise SourceError(str(error)) from error
        if not num_samples:
            raise SourceError(f"{self.uri}: holds no samples; expected of each: {_EXPECTED}")


class WebDatasetSource:
    """WebDataset shards: a folder of tars, or one. An identity is the text of the label."""

    def __init__(self, spec: SourceSpec) -> None:
        self._listing = look_through(spec.uri, EXTENSIONS, "WebDataset shards")

    @staticmethod
    def recognises(place: Place) -> bool:
        """Tars, the first of which starts with a sample: one of folders of images does not."""
        shards = files_at(place, EXTENSIONS)
        return bool(shards) and _starts_with_sample(shards[0])

    def parts(self, part_bytes: int) -> list[Part]:
        """One per shard."""
        listing = self._listing
        return [
            _Shard(uri=listing.uri(name), num_bytes=num_bytes)
            for name, num_bytes in zip(listing.names, listing.sizes, strict=True)
        ]

    def version(self) -> dict[str, Any]:
        """Names, sizes and times of change of the shards."""
        return {"files": self._listing.digest}

    def describe(self) -> dict[str, Any]:
        """Number and size of the shards."""
        return {
            "format": "webdataset",
            "num_files": len(self._listing.names),
            "num_bytes": sum(self._listing.sizes),
            "num_other_files": self._listing.num_others,
        }


def _starts_with_sample(uri: str) -> bool:
    fields: dict[str, dict[str, bytes]] = {}
    with storage.open_read(uri) as stream:
        try:
            for name, body, _ in islice(members(cast(BinaryIO, stream), uri), _MEMBERS_LOOKED_AT):
                key, field = split_key(name)
                fields.setdefault(key, {})[field] = body
        except TarError:
            pass  # packing says what is wrong with it, once its format is known
    return any(_is_sample(of_key) for of_key in fields.values())


def _is_sample(fields: dict[str, bytes]) -> bool:
    try:
        _image(fields, "")
        identity = _identity(fields, "")
    except SourceError:
        return False
    # A caption beside an image in a tar of folders is no label.
    return LABEL_EXTENSION in fields or "json" in fields or " " not in identity

"""The data card: what a packed data set is, in words and pictures, beside its manifest."""

from __future__ import annotations

import re
from typing import Final

from pipeline import storage
from pipeline.data.card_figures import images_figure, people_figure, png
from pipeline.data.contact_sheet import Row, choose_faces, contact_sheet, in_rows
from pipeline.data.manifest import Manifest
from pipeline.data.pack_report import PackReport
from pipeline.data.summary import Findings, Name, Section, sections

NAME: Final = "data_card.md"
PICTURES: Final = "data_card"
_PEOPLE: Final = f"{PICTURES}/samples_per_person.png"
_IMAGES: Final = f"{PICTURES}/images.png"
_RANDOM: Final = f"{PICTURES}/faces.jpg"
_SAME: Final = f"{PICTURES}/people.jpg"


def write_card(manifest: Manifest, report: PackReport) -> None:
    """Write the card of a data set beside its manifest: ``data_card.md`` and the pictures in ``data_card/``.

    Args:
        manifest: The set; its shards are read, ``manifest.json`` is not.
        report: What packing found.

    Raises:
        StorageError: A shard cannot be read, or the card not be written.
        ShardError: A shard is not what the manifest says.
    """
    save_card(card_files(manifest, report), manifest.uri)


def save_card(files: dict[str, bytes], folder: str) -> None:
    """Write what `card_files` gave into a folder; pictures that only an earlier card had are deleted."""
    for name in (_PEOPLE, _IMAGES, _RANDOM, _SAME):
        if name not in files:
            storage.delete_file(storage.join(folder, name))
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)


def card_files(manifest: Manifest, found: Findings) -> dict[str, bytes]:
    """Make the card: the text, and each picture, by its name in the folder of the card. Equal sets have equal cards.

    Raises:
        StorageError: A shard cannot be read.
        ShardError: A shard is not what the manifest says.
    """
    faces = choose_faces(manifest)
    files = {
        _PEOPLE: png(people_figure(found.samples_per_identity)),
        _IMAGES: png(images_figure(found.statistics)),
        _RANDOM: contact_sheet(in_rows(faces.random), manifest.image_side),
    }
    if faces.people:
        rows = [Row(images=images, caption=_caption(manifest, found, label)) for label, images in faces.people]
        files[_SAME] = contact_sheet(rows, manifest.image_side)
    return {NAME: _text(manifest, found, files).encode(errors="backslashreplace")} | files


def _caption(manifest: Manifest, found: Findings, label: int) -> str:
    parts = [f"label {label}"]
    if isinstance(found, PackReport):
        parts.append(f"{found.samples_per_identity[label]:,} images")
    if manifest.identities[label] != str(label):
        parts.append(manifest.identities[label])
    return "  ·  ".join(parts)


def _text(manifest: Manifest, found: Findings, files: dict[str, bytes]) -> str:
    blocks = [f"# Data card: {manifest.num_samples:,} faces of {manifest.num_classes:,} people"]
    for section in sections(manifest, found):
        blocks.append(_markdown(section))
        if section.title == "Images of a person":
            blocks.append(f"![How many people have how many images]({_PEOPLE})")
        if section.title == "Images":
            blocks.append(f"![Brightness, contrast and size of the images]({_IMAGES})")
    blocks += ["## Faces", "The first images of the first shard; packing has shuffled them.", f"![Faces]({_RANDOM})"]
    blocks.append("## The same people")
    if _SAME in files:
        blocks += [
            "Each row shows images of one person, if the labels are right: the people that occur most often in the "
            "first shards.",
            f"![Several images of each of some people]({_SAME})",
        ]
    else:
        blocks.append("No person occurs twice in the first shards.")
    return "\n\n".join(blocks) + "\n"


def _markdown(section: Section) -> str:
    lines = [f"## {section.title}"]
    if section.rows:
        numeric = ["---", *["---:"] * (len(section.columns) - 1)] if any(section.columns) else ["---", "---"]
        table = [_row(section.columns), _row(numeric), *(_row([_cell(cell) for cell in row]) for row in section.rows)]
        lines.append("\n".join(table))
    if section.notes:
        lines.append("\n".join(f"- {_escaped(note)}" for note in section.notes))
    return "\n\n".join(lines)


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return code_span(text) if isinstance(text, Name) else _escaped(text)


def code_span(text: str) -> str:
    """A text out of the data as a code span within a table: nothing in it is a link, a picture or markup."""
    shown = "".join(character if character.isprintable() else " " for character in text).strip()
    if not shown:
        return ""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if "`" in shown else ""
    return f"{fence}{pad}{shown}{pad}{fence}".replace("|", r"\|")


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(text.split()))

"""A packed data set in a few tables: the same ones in its data card and on the terminal."""

# Shape legend: K = bins

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipeline.data.card_figures import BRIGHTNESS_EDGES, BYTES_EDGES, CONTRAST_EDGES, Floats
from pipeline.data.checks import ImageStatistics
from pipeline.data.manifest import Manifest
from pipeline.data.pack_report import QUARANTINE, PackReport
from pipeline.data.survey import Survey

QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SIZES_LISTED: Final = 12
# Bounds of what is told as odd, at edges of the bins of `ImageStatistics`.
DARK: Final = 24
BRIGHT: Final = 232
FLAT: Final = 8

Findings = PackReport | Survey


class Name(str):
    """A cell that is to be shown as it is: a name out of the data, a number in hex."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One table and what is to be said about it.

    Attributes:
        title: Heading.
        columns: Headings of the columns; all empty for a table of names and values.
        rows: Cells; the first column names the row.
        notes: Sentences below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


def sections(manifest: Manifest, found: Findings) -> list[Section]:
    """All tables of a data set, in order."""
    parts = [_set(manifest), _left_out(found) if isinstance(found, PackReport) else _looked_at(found)]
    return [*parts, *_duplicates(found), _people(manifest, found), *_few(found), _images(found), *_kinds(found)]


def _set(manifest: Manifest) -> Section:
    sizes = sorted({shard.num_samples for shard in manifest.shards})
    each = f"{sizes[-1]:,}" if len(sizes) == 1 else f"{sizes[-1]:,}, the last one {manifest.shards[-1].num_samples:,}"
    rows = [
        ("samples", f"{manifest.num_samples:,}"),
        ("people", f"{manifest.num_classes:,}"),
        ("images", f"{manifest.image_side}x{manifest.image_side} pixels"),
        ("shards", f"{len(manifest.shards):,}"),
        ("samples of a shard", each),
        ("size", size_text(sum(shard.num_bytes for shard in manifest.shards))),
        ("seed of the shuffle", str(manifest.seed)),
        ("fingerprint", Name(manifest.fingerprint)),
    ]
    rows += [(f"source: {key}", Name(_plain(value))) for key, value in sorted(manifest.source.items())]
    return Section(title="Data set", columns=("", ""), rows=tuple(rows))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _left_out(report: PackReport) -> Section:
    read = max(1, report.num_read)
    rows = [(f"left out: {kind}", f"{count:,}", _share(count, read)) for kind, count in report.dropped.items()]
    notes = [] if rows else ["Every image of the source is in the shards."]
    if any(kind != "duplicate" for kind in report.dropped):
        notes.append(f"Each image that was left out as bad is listed, with the reason, in {QUARANTINE}.")
    if report.checks.get("decode") is False:
        notes.append("Images were packed unseen: undecodable ones and other sizes will be met in training.")
    if report.checks.get("duplicates") == "keep":
        notes.append("Equal images were not looked for.")
    return Section(
        title="From the source to the shards",
        columns=("", "images", "share"),
        rows=(
            ("in the source", f"{report.num_read:,}", _share(report.num_read, read)),
            *rows,
            ("packed", f"{report.num_packed:,}", _share(report.num_packed, read)),
        ),
        notes=tuple(notes),
    )


def _looked_at(survey: Survey) -> Section:
    seen, all_shards = len(survey.shards), survey.num_shards
    images = survey.statistics.count
    notes = [] if survey.is_whole else [f"All that follows is about these {seen:,} shards."]
    notes += [f"{shard}: {key}: {reason}" for shard, key, reason in survey.unreadable_examples]
    return Section(
        title="What was looked at",
        columns=("", "found", "share"),
        rows=(
            ("shards", f"{seen:,} of {all_shards:,}", _share(seen, all_shards)),
            ("images", f"{images:,}", ""),
            ("images that cannot be decoded", f"{survey.num_unreadable:,}", _share(survey.num_unreadable, images)),
        ),
        notes=tuple(notes),
    )


def _duplicates(found: Findings) -> list[Section]:
    if isinstance(found, Survey) or not found.duplicates_across:
        return []
    return [
        Section(
            title="One image, two people",
            columns=("image", "first copy"),
            rows=tuple((Name(name), Name(first)) for name, first in found.duplicate_examples),
            notes=(
                f"{found.duplicates_across:,} images have the same bytes as one of another person: one of both has "
                "the wrong label. The first copy was packed.",
                *_examples(len(found.duplicate_examples), found.duplicates_across),
            ),
        )
    ]


def _people(manifest: Manifest, found: Findings) -> Section:
    counts = np.asarray(found.samples_per_identity, np.int64)
    met = counts[counts > 0]
    heads = ("", "fewest", *(_percent(q) for q in QUANTILES), "most", "mean")
    quantiles = (f"{value:,.0f}" for value in np.quantile(met, QUANTILES, method="inverted_cdf"))
    row = ("images", f"{met.min():,}", *quantiles, f"{met.max():,}", f"{met.mean():,.1f}")
    notes = []
    if isinstance(found, Survey) and len(met) < manifest.num_classes:
        notes = [f"{len(met):,} of the {manifest.num_classes:,} people occur in the shards that were looked at."]
    return Section(title="Images of a person", columns=heads, rows=(row,), notes=tuple(notes))


def _few(found: Findings) -> list[Section]:
    if isinstance(found, Survey) or not found.num_few:
        return []
    return [
        Section(
            title="People with few images",
            columns=("person",),
            rows=tuple((Name(name),) for name in found.few_examples),
            notes=(
                f"{found.num_few:,} people have fewer than {found.fewer_than:,} images.",
                *_examples(len(found.few_examples), found.num_few),
            ),
        )
    ]


def _images(found: Findings) -> Section:
    seen = found.statistics
    quantities = [
        ("brightness", seen.brightness, BRIGHTNESS_EDGES, False),
        ("contrast", seen.contrast, CONTRAST_EDGES, False),
        ("bytes", seen.num_bytes, BYTES_EDGES, True),
    ]
    rows = tuple(
        (name, *(f"{value:,.0f}" for value in quantiles(counts, edges, is_log=is_log)))
        for name, counts, edges, is_log in quantities
        if sum(counts)
    )
    notes = [f"About {seen.count:,} images, read off histograms. {size_text(seen.total_bytes)} in all."]
    if isinstance(found, PackReport) and found.num_read != found.num_packed:
        notes.append("Images that were left out are counted too.")
    return Section(
        title="Images", columns=("", *map(_percent, QUANTILES)), rows=rows, notes=(*notes, *_pixel_notes(seen))
    )


def _pixel_notes(seen: ImageStatistics) -> list[str]:
    decoded = sum(seen.brightness)
    if not decoded:
        return ["They were not decoded: brightness, contrast, sizes in pixels and colours are not known."]
    notes = ["Brightness is the mean grey value of an image (0 to 255), contrast the deviation of its grey values."]
    odd = (
        (f"very dark (brightness below {DARK})", sum(seen.brightness[: _bin(BRIGHTNESS_EDGES, DARK)])),
        (f"very bright (brightness from {BRIGHT} on)", sum(seen.brightness[_bin(BRIGHTNESS_EDGES, BRIGHT) :])),
        (f"nearly empty (contrast below {FLAT})", sum(seen.contrast[: _bin(CONTRAST_EDGES, FLAT)])),
    )
    return notes + [f"{count:,} ({_share(count, decoded)}) are {what}." for what, count in odd if count]


def _kinds(found: Findings) -> list[Section]:
    seen = found.statistics
    decoded = sum(seen.sizes.values())
    if not decoded:
        return []
    ranked = sorted(seen.sizes.items(), key=lambda item: (-item[1], item[0]))
    rows = [(name, f"{count:,}", _share(count, decoded)) for name, count in ranked[:SIZES_LISTED]]
    if rest := ranked[SIZES_LISTED:]:
        count = sum(count for _, count in rest)
        rows.append((f"{len(rest):,} other sizes", f"{count:,}", _share(count, decoded)))
    colours = sorted(seen.colours.items(), key=lambda item: (-item[1], item[0]))
    rows += [(name, f"{count:,}", _share(count, decoded)) for name, count in colours]
    return [Section(title="Sizes and colours found", columns=("", "images", "share"), rows=tuple(rows))]


def quantiles(counts_K: Sequence[int], edges: Floats, *, is_log: bool = False) -> list[float]:
    """`QUANTILES` of a histogram, as if values lay evenly in each bin.

    Args:
        counts_K: Of each bin; not all zero.
        edges: Of the bins [K + 1].
        is_log: Values lie evenly on a log axis.
    """
    cumulated = np.concatenate(([0], np.cumsum(counts_K)))
    values = []
    for wanted in np.array(QUANTILES) * cumulated[-1]:
        place = int(np.searchsorted(cumulated, wanted)) - 1  # the bin that holds it: below wanted, and not empty
        part = (wanted - cumulated[place]) / (cumulated[place + 1] - cumulated[place])
        low, high = edges[place], edges[place + 1]
        values.append(float(low * (high / low) ** part if is_log else low + part * (high - low)))
    return values


def size_text(num_bytes: int) -> str:
    """Bytes for people to read: exact, and in the unit that fits."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{num_bytes:,} bytes" if unit == "bytes" else f"{value:.3g} {unit} ({num_bytes:,} bytes)"


def _bin(edges: Floats, bound: float) -> int:
    return int(np.searchsorted(edges, bound))


def _share(count: int, total: int) -> str:
    share = 100 * count / max(1, total)
    return f"{share:.3f} %" if 0 < share < 1 else f"{share:.1f} %"


def _percent(quantile: float) -> str:
    return "median" if quantile == 0.5 else f"{quantile:.0%}"


def _examples(shown: int, total: int) -> list[str]:
    return [f"The table has {shown:,} of them."] if shown < total else []

"""What packing found: kept beside the manifest, and drawn in the data card."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

from pipeline import storage
from pipeline.data.checks import ImageStatistics

NAME: Final = "report.json"
QUARANTINE: Final = "quarantine.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackReport:
    """What packing found.

    Attributes:
        num_read: Images of the source.
        dropped: Images that were left out, by reason (``undecodable``, ``wrong-size``, ``near-empty``, ``duplicate``);
            all but duplicates are listed in ``quarantine.jsonl``.
        duplicates_across: Of the duplicates, those whose first copy belongs to another person: wrong labels; None where
            nobody looked (``checks.duplicates`` keep).
        duplicate_examples: Some of those, as (name in the source, name of the first copy).
        samples_per_identity: Images packed of each person, by label.
        fewer_than: The bound of the next two.
        num_few: People with fewer images than that.
        few_examples: Some of them, by name.
        statistics: Over all images read that could be decoded.
        checks: `PackChecks` as a dict: what was looked at.
    """

    num_read: int
    dropped: dict[str, int]
    duplicates_across: int | None
    duplicate_examples: list[tuple[str, str]]
    samples_per_identity: list[int]
    fewer_than: int
    num_few: int
    few_examples: list[str]
    statistics: ImageStatistics
    checks: dict[str, Any] = field(default_factory=dict)

    @property
    def num_packed(self) -> int:
        """Images in the shards."""
        return sum(self.samples_per_identity)

    def save(self, folder: str) -> None:
        """Write it beside the manifest."""
        storage.write_json(storage.join(folder, NAME), asdict(self))


def load_report(folder: str) -> PackReport | None:
    """The report of a packed data set; None where there is none (sets that others packed)."""
    uri = storage.join(folder, NAME)
    if not storage.exists(uri):
        return None
    content: dict[str, Any] = storage.read_json(uri)
    return PackReport(
        **content
        | {
            "duplicate_examples": [(name, first) for name, first in content["duplicate_examples"]],
            "statistics": ImageStatistics(**content["statistics"]),
        }
    )

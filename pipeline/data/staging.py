"""What a packing keeps in its output folder until it is finished, and how a later one goes on from it.

At any time a folder with shards of ours has a manifest (finished) or ``.packing/plan.json`` (not yet finished, or to be
cleared). Shards beside neither were put there by others, and are never deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from pipeline import storage
from pipeline.data import manifest
from pipeline.data.spill import PackError

NAME: Final = ".packing"
_SHARD: Final = re.compile(r"shard-\d{6,}\.tar")
_PARTIAL: Final = re.compile(r"\..+\.[0-9a-f]{32}\.partial")  # of `storage.write_bytes`, where a kill came between


class Staging:
    """The state of one packing.

    Args:
        output: Folder URI of the data set.

    Attributes:
        parts: Folder of the first pass; known once `prepare` was called.
        shards: Folder of the notes of finished shards; likewise.
    """

    def __init__(self, output: str) -> None:
        self._output = output
        self._manifest = storage.join(output, manifest.NAME)
        self._folder = storage.join(output, NAME)
        self._plan = storage.join(self._folder, "plan.json")
        self.parts = self.shards = ""

    def prepare(self, packing: dict[str, Any], new_plan: Callable[[], Any], is_current: Callable[[Any], bool]) -> Any:
        """Go on with what an interrupted packing of the same left, or clear what another left; no manifest remains.

        Args:
            packing: Everything that decides what is packed; JSON.
            new_plan: Makes what is to be remembered; JSON.
            is_current: Whether what was remembered still holds.

        Returns:
            What ``new_plan`` gave, now or then.

        Raises:
            PackError: The folder holds shards that are not ours.
        """
        # Named by what is packed: a task of another packing that outlives its driver notes its work elsewhere.
        own = storage.join(self._folder, storage.fingerprint(packing)[:16])
        self.parts, self.shards = storage.join(own, "parts"), storage.join(own, "shards")
        names = (storage.list_folder(self._output)[0] or ()) if storage.exists(self._output) else ()
        for name in filter(_PARTIAL.fullmatch, names):
            storage.delete_file(storage.join(self._output, name))
        before = storage.read_json(self._plan) if storage.exists(self._plan) else None
        if before and before["packing"] == packing and is_current(before["plan"]):
            storage.delete_file(self._manifest)
            return before["plan"]
        shards = list(filter(_SHARD.fullmatch, names))
        if shards and before is None and manifest.NAME not in names:
            raise PackError(
                f"{self._output}: holds {shards[0]} without {manifest.NAME}: shards that were not packed here; "
                "pack into another folder, or delete them"
            )
        storage.write_json(self._plan, {})
        storage.delete_file(self._manifest)
        for name in storage.list_folder(self._folder)[1]:
            storage.delete_tree(storage.join(self._folder, name))
        for name in shards:
            storage.delete_file(storage.join(self._output, name))
        plan = new_plan()
        storage.write_json(self._plan, {"packing": packing, "plan": plan})
        return plan

    def remove(self) -> None:
        """Delete it, once the manifest is there. After an interruption, a later packing does without what is gone."""
        storage.delete_tree(self._folder)

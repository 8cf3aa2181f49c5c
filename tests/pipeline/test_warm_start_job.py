"""The whole job, twice: the second run starts from what the first one registered, on data with more people."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from lgaf import load_exported
from pipeline import cli, storage
from pipeline.config import TrainConfig, WorkersConfig
from pipeline.data.sources import SyntheticConfig
from pipeline.model_card import CARD
from pipeline.training.metrics_log import read_metrics
from pipeline.training.warm_start import WarmStart, read_note
from tests.pipeline.test_training_job import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FIRST = replace(SMALL, epochs=20, workers=WorkersConfig(checkpoint_every_steps=50, log_every_steps=2), run_name="first")
GROWN = replace(
    FIRST,
    epochs=1,
    pack=replace(FIRST.pack, synthetic=SyntheticConfig(num_identities=10, images_per_identity=17)),
)


def _run(config: TrainConfig) -> dict:
    return cli.run_training(cli._with_place(config))


def test_a_run_goes_on_from_the_champion_with_more_people(tmp_path, ray_cluster, capsys):
    place = str(tmp_path)
    first = _run(replace(FIRST, storage=place))
    start = WarmStart(model="models:/small@champion", head=f"{place}/first")
    capsys.readouterr()
    warm = _run(replace(GROWN, storage=place, run_name="warm", num_workers=1, warm_start=start))
    told = " ".join(capsys.readouterr().out.split())
    _run(replace(GROWN, storage=place, run_name="fresh", num_workers=1))

    note = read_note(f"{place}/warm")
    assert note.model.source == "models:/small/1"
    assert note.model.fingerprint == first["train"].fingerprint
    assert (note.classes.num_kept, note.classes.num_new, note.classes.num_dropped) == (8, 2, 0)
    assert note.head.same_network is True
    assert "8 kept, 2 new, 0 dropped" in told
    losses = {name: [line["loss"] for line in read_metrics(f"{place}/{name}")] for name in ("first", "warm", "fresh")}
    assert losses["fresh"][0] == pytest.approx(losses["first"][0], rel=0.2)
    assert losses["warm"][0] < 0.7 * losses["fresh"][0], losses

    folder = storage.local_path(warm["train"].model_uri)
    text = (folder / CARD).read_text()
    assert f"`models:/small/1`, SHA-256 `{first['train'].fingerprint}` and class centres" in text
    assert "170, 10" in text
    (entry,) = yaml.safe_load(text.split("---\n")[1])["model-index"]
    accuracies = {result["dataset"]["name"]: result["metrics"][0]["value"] for result in entry["results"]}
    assert accuracies == {found.name: pytest.approx(found.accuracy) for found in warm["evaluate"].benchmarks}
    with torch.no_grad():
        assert load_exported(folder)(torch.zeros(1, 3, 112, 112)).embedding_BD.shape == (1, 16)
    assert all(str(tmp_path) not in line for line in text.splitlines() if not line.startswith("| data |"))
    # A finished run that is started again finds all done.
    again = _run(replace(GROWN, storage=place, run_name="warm", num_workers=1, warm_start=start))
    assert again == warm

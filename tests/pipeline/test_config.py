"""Run configurations: presets are valid and survive JSON, the paper's recipe is the paper's, bad values are named."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgaf.config import from_dict
from lgaf.heads.margins import create_margin
from lgaf.heads.screening import SampleScreening
from lgaf.models import LGAFConfig
from lgaf.optim import OptimizerConfig
from lgaf.schedule import Schedule
from lgaf.step import StepConfig
from pipeline import presets
from pipeline.config import HeadConfig, PackConfig, TrainConfig, WorkersConfig
from pipeline.data.stream_plan import StreamConfig
from pipeline.storage import plain_json
from pipeline.training.divergence import DivergenceConfig

PRESETS = presets.names()


def test_there_are_presets():
    assert len(PRESETS) == len(set(PRESETS))
    assert {"demo", "webface4m_r100_cosface", "table4_iaff", "head_uniface", "network_transface"} <= set(PRESETS)
    with pytest.raises(KeyError):
        presets.preset("head_nothing")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_named_after_themselves(name):
    config = presets.preset(name)
    assert isinstance(config, TrainConfig)
    assert config.preset == name
    assert config == presets.preset(name), "a preset is a value"
    assert not config.run_name, "runs are named by their content"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = presets.preset(name)
    assert from_dict(TrainConfig, plain_json(asdict(config))) == config
    changed = replace(config, epochs=3, schedule=Schedule(milestones=(), warmup=0.5), run_name="x")
    assert from_dict(TrainConfig, plain_json(asdict(changed))) == changed


@pytest.mark.parametrize("num_workers", [3, (1, 3)])
def test_one_number_of_workers_or_two_survive_json(num_workers):
    config = _demo(num_workers=num_workers)
    assert from_dict(TrainConfig, plain_json(asdict(config))) == config
    assert (config.fewest_workers, config.most_workers) == (num_workers if isinstance(num_workers, tuple) else (3, 3))


@given(
    st.builds(LGAFConfig, embedding_dim=st.sampled_from([8, 64]), branches=st.sampled_from([("local",), ("global",)])),
    st.builds(Schedule, milestones=st.lists(st.floats(0.01, 1), max_size=3).map(lambda m: tuple(sorted(m)))),
    st.builds(OptimizerConfig, learning_rate=st.floats(1e-9, 1e3), weight_decay=st.floats(0, 1)),
    st.integers(1, 99),
)
def test_any_configuration_survives_json(model, schedule, optimizer, epochs):
    config = TrainConfig(preset="x", model=model, schedule=schedule, optimizer=optimizer, epochs=epochs)
    assert from_dict(TrainConfig, plain_json(asdict(config))) == config


def test_webface4m_is_the_papers_recipe():
    config = presets.webface4m_r100_arcface()
    assert config.model == LGAFConfig(
        backbone="iresnet100",
        embedding_dim=512,
        branches=("global", "local"),
        num_heads=4,
        scales=(1, 3, 5),
        quality="norm",
        fusion="add",
    )
    assert config.head == HeadConfig(name="arcface", margin=0.4, scale=64.0)
    assert config.optimizer == OptimizerConfig(learning_rate=0.1, momentum=0.9, weight_decay=5e-4)
    assert (config.batch_size, config.epochs) == (512, 26)
    assert config.schedule.milestones == pytest.approx((12 / 26, 20 / 26, 24 / 26))
    assert (config.schedule.factor, config.schedule.warmup) == (0.1, 0.0)
    steps_per_epoch = 4_235_242 // config.batch_size
    total = steps_per_epoch * config.epochs
    rates = [config.schedule.learning_rate(0.1, epoch * steps_per_epoch, total) for epoch in range(26)]
    assert rates == pytest.approx([0.1] * 12 + [0.01] * 8 + [0.001] * 4 + [0.0001] * 2)


def test_the_rows_of_the_tables_are_the_settings_of_the_documentation():
    rows = {"table1_local": {"branches": ("local",)}, "table2_16_heads": {"num_heads": 16}}
    for row, changes in rows.items():
        assert presets.preset(row) == replace(presets.ms1mv2_r100_arcface(), preset=row, model=LGAFConfig(**changes))
    networks = {repr(presets.preset(row).model) for row in presets.TABLES}
    assert len(networks) == len(presets.TABLES) - 4, "LGAF, b=4, Energy and ADD are one, III and Baseline another"


def test_arcface_torchs_recipe_is_its_own():
    config = presets.arcface_torch_ms1mv2()
    assert (config.batch_size, config.epochs, config.precision, config.optimizer.max_norm) == (1024, 20, "float16", 5.0)
    assert (config.head.margin, config.stream.augmentation, config.model.branches) == (0.5, "flip", ("global",))
    assert [config.schedule.learning_rate(0.1, step, 4) for step in range(4)] == pytest.approx(
        [0.1, 0.075, 0.05, 0.025]
    )


def test_compared_heads_have_their_papers_margins():
    assert presets.preset("head_curricularface").head.create().margin == 0.5
    assert presets.preset("network_transface").optimizer.kind == "adamw"
    assert presets.preset("network_hpda").schedule == presets.ms1mv2_r100_arcface().schedule


def _demo(**changes: object) -> TrainConfig:
    return replace(presets.demo(), **changes)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: _demo(batch_size=127), r"batch_size=127 must be a multiple of stream\.num_streams=4"),
        (lambda: _demo(batch_size=4, num_workers=5), r"batch_size=4 is less than the 5 workers"),
        (lambda: _demo(epochs=0), r"epochs=0 must be greater than 0"),
        (lambda: _demo(batch_size=0), r"batch_size=0 must be greater than 0"),
        (lambda: _demo(num_workers=-1), r"num_workers=-1 must be greater than 0"),
        (lambda: _demo(num_workers=(0, 2)), r"num_workers=0 must be greater than 0"),
        (lambda: _demo(num_workers=(3, 2)), r"num_workers=\(3, 2\) must be a number, or the fewest and then the most"),
        (lambda: _demo(batch_size=4, num_workers=(2, 5)), r"batch_size=4 is less than the 5 workers"),
        (lambda: WorkersConfig(hang_timeout_s=-1), r"hang_timeout_s=-1 must lie in"),
        (lambda: WorkersConfig(storage_patience_s=0), r"storage_patience_s=0 must be greater than 0"),
        (lambda: WorkersConfig(max_failures=-2), r"max_failures=-2 must lie in"),
        (lambda: WorkersConfig(keep_best_checkpoints=-1), r"keep_best_checkpoints=-1 must lie in"),
        (lambda: _demo(run_name="a/b"), r"run_name='a/b' must be usable as a folder name"),
        (lambda: _demo(run_name="s3:x"), r"run_name='s3:x'"),
        (lambda: _demo(run_name=".."), r"run_name='\.\.'"),
        (lambda: _demo(seed=-1), r"seed=-1"),
        (lambda: _demo(step=StepConfig(accumulate=33)), r"step\.accumulate=33 leaves less than two.*of the 64"),
        (lambda: _demo(step=StepConfig(gradient_compression="bfloat16")), r"'bfloat16' needs workers\.use_gpu"),
        (lambda: _demo(step=StepConfig(sync_batch_norm=True)), r"sync_batch_norm=True needs workers\.use_gpu"),
        (lambda: _demo(head=HeadConfig(update="backward"), precision="float16"), r"head\.update='backward'"),
        (
            lambda: _demo(head=HeadConfig(update="backward"), optimizer=OptimizerConfig(max_norm=5.0)),
            r"head\.update='backward' goes with optimizer\.kind='sgd' and optimizer\.max_norm=0",
        ),
        (
            lambda: _demo(head=HeadConfig(update="backward"), divergence=DivergenceConfig(policy="skip")),
            r"divergence\.policy='skip'",
        ),
        (lambda: LGAFConfig(backbone="tinny"), r"model\.backbone='tinny'.*did you mean 'tiny'.*iresnet100"),
        (lambda: LGAFConfig(embedding_dim=10), r"model\.num_heads=4 must divide model\.embedding_dim=10"),
        (lambda: LGAFConfig(scales=(2,)), r"model\.scales=\(2,\)"),
        (lambda: LGAFConfig(branches=()), r"model\.branches=\(\)"),
        (lambda: LGAFConfig(dropout=1.0), r"model\.dropout=1\.0"),
        (lambda: HeadConfig(name="arcfase"), r"head\.name='arcfase'.*did you mean 'arcface'"),
        (lambda: HeadConfig(scale=0.0), r"head\.scale=0\.0"),
        (lambda: HeadConfig(margin=-0.1), r"head\.margin=-0\.1"),
        (lambda: HeadConfig(name="magface", margin=0.5), r"head\.margin=0\.5: magface has no.*margin None.*l_margin"),
        (lambda: HeadConfig(name="adaface", options={"hh": 0.3}), r"head: the key='hh'.*did you mean 'h'"),
        (lambda: HeadConfig(margin=0.4, options={"margin": 0.1}), r"head\.margin=0\.4 is in head\.options too: 0\.1"),
        (lambda: HeadConfig(name="adaface", options={"h": "big"}), r"head\.h='big' must be of type float"),
        (lambda: SampleScreening(strength=2.0), r"screening\.strength=2\.0"),
        (lambda: StreamConfig(num_streams=0), r"stream\.num_streams=0"),
        (lambda: StreamConfig(augmentation="adafase"), r"stream\.augmentation='adafase'.*adaface"),
        (lambda: PackConfig(samples_per_shard=0), r"pack\.samples_per_shard=0"),
        (lambda: WorkersConfig(keep_checkpoints=0), r"workers\.keep_checkpoints=0"),
        (lambda: WorkersConfig(threads=-1), r"workers\.threads=-1"),
    ],
)
def test_bad_values_are_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_margins_own_fields_are_options():
    head = HeadConfig(name="magface", scale=32.0, options={"l_a": 5, "easy_margin": False})
    margin = head.create()
    assert (margin.scale, margin.l_a, margin.easy_margin, margin.u_a) == (32.0, 5.0, False, 110.0)
    assert HeadConfig(name="arcface").create() == create_margin("arcface")
    assert from_dict(HeadConfig, json.loads(json.dumps(asdict(head))), "head") == head


def test_nothing_is_screened_by_default():
    assert presets.demo().screening.strength == presets.webface4m_r100_arcface().screening.strength == 0.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epoch": 3}, r"'epoch' is not valid \(did you mean 'epochs'\?\)"),
        ({"model": {"bakbone": "tiny"}}, r"model: the key='bakbone'.*did you mean 'backbone'"),
        ({"epochs": "3"}, r"epochs='3' must be of type int"),
        ({"epochs": True}, r"epochs=True must be of type int"),
        ({"precision": "fp8"}, r"precision='fp8'.*float32, bfloat16"),
        ({"model": 3}, r"model=3 must be a mapping"),
        ({"schedule": {"milestones": 0.5}}, r"schedule\.milestones=0\.5 must be a list"),
        ({"schedule": {"milestones": ["x"]}}, r"schedule\.milestones\[0\]='x' must be of type float"),
        ({"model": {"branches": ["global", "locale"]}}, r"model\.branches\[1\]='locale'.*did you mean 'local'"),
    ],
)
def test_bad_json_is_named(change, text):
    with pytest.raises(ValueError, match=text):
        from_dict(TrainConfig, {"preset": "x"} | change)


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="TrainConfig: missing preset"):
        from_dict(TrainConfig, {})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sample_rate": 0.0}, r"head\.sample_rate=0\.0 must lie in"),
        ({"sample_rate": 1.1}, r"head\.sample_rate=1\.1 must lie in"),
        ({"memory_budget_mib": 0}, r"head\.memory_budget_mib=0 must lie in"),
        ({"precision": "float16"}, r"head\.precision='float16'.*float32, bfloat16"),
        ({"update": "later"}, r"head\.update='later'.*optimizer, backward"),
    ],
)
def test_settings_of_the_head_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        HeadConfig(**options)


def test_uniface_starts_from_the_classes_that_it_sees():
    assert HeadConfig(name="uniface", sample_rate=0.2).create() == create_margin("uniface", r=0.2)
    assert HeadConfig(name="uniface", sample_rate=0.2, options={"r": 0.5}).create() == create_margin("uniface", r=0.5)

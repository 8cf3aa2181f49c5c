"""Named runs: each is a function that returns a complete configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from lgaf.models import LGAFConfig
from lgaf.models.peers import CQAFaceConfig, HPDAConfig, LSCNNConfig, TransFaceConfig, URLConfig
from lgaf.optim import OptimizerConfig
from lgaf.schedule import Schedule
from pipeline.config import HeadConfig, PackConfig, TrackingConfig, TrainConfig, WorkersConfig
from pipeline.data.sources import SyntheticConfig
from pipeline.data.stream_plan import StreamConfig

# Tables 1-4 of the paper, trained on MS1MV2: what each row changes in the network (docs/fidelity.md says why).
TABLES: Final[Mapping[str, Mapping[str, Any]]] = {
    "table1_local": {"branches": ("local",)},
    "table1_global": {"branches": ("global",)},
    "table1_both": {"quality": "none"},
    "table1_lgaf": {},
    "table2_2_heads": {"num_heads": 2},
    "table2_4_heads": {"num_heads": 4},
    "table2_8_heads": {"num_heads": 8},
    "table2_16_heads": {"num_heads": 16},
    "table3_baseline": {"quality": "none"},
    "table3_entropy": {"quality": "entropy"},
    "table3_energy": {"quality": "norm"},
    "table4_cat": {"fusion": "cat"},
    "table4_iaff": {"fusion": "iaff", "quality": "none"},
    "table4_add": {"fusion": "add"},
}

# Heads that the paper compares with, each with its own paper's margin and scale, under one recipe.
COMPARED_HEADS: Final = ("combined", "adaface", "magface", "mv_softmax", "curricularface", "uniface")

# Likewise networks. TransFace's is its paper's: AdamW and a cosine, for a transformer hardly learns by this SGD.
COMPARED_NETWORKS: Final[Mapping[str, Mapping[str, Any]]] = {
    "ls_cnn": {"model": LSCNNConfig()},
    "hpda": {"model": HPDAConfig()},
    "cqa_face": {"model": CQAFaceConfig()},
    "url": {"model": URLConfig()},
    "transface": {
        "model": TransFaceConfig(),
        "optimizer": OptimizerConfig(kind="adamw", learning_rate=1e-3, weight_decay=0.1, max_norm=5.0),
        "schedule": Schedule(kind="cosine", warmup=0.1),
    },
}


def demo() -> TrainConfig:
    """The whole path at a size for two CPU cores, with the paper's schedule and augmentation.

    A thousandth of the paper's data cannot carry its margin and scale: with s = 64, m = 0.4 and dropout the loss of so
    short a run hardly falls. Hence CosFace with s = 32, m = 0.2, a short warm-up and no dropout.
    """
    return TrainConfig(
        preset="demo",
        epochs=18,
        batch_size=128,
        precision="bfloat16",
        model=LGAFConfig(backbone="tiny", embedding_dim=128, dropout=0.0),
        head=HeadConfig(name="cosface", margin=0.2, scale=32.0),
        schedule=Schedule(warmup=0.05),
        pack=PackConfig(samples_per_shard=256, synthetic=SyntheticConfig(num_identities=100, images_per_identity=16)),
        stream=StreamConfig(num_streams=4, block_rows=128),
        workers=WorkersConfig(checkpoint_every_steps=20),
        tracking=TrackingConfig(experiment="lgaf-demo", model_name="lgaf-demo"),
    )


def ms1mv2_r100_arcface() -> TrainConfig:
    """The paper's run on MS1MV2 with ArcFace, m = 0.4 (4.1.3)."""
    return _paper("ms1mv2_r100_arcface", "ms1mv2", "arcface")


def ms1mv2_r100_cosface() -> TrainConfig:
    """The paper's run on MS1MV2 with CosFace."""
    return _paper("ms1mv2_r100_cosface", "ms1mv2", "cosface")


def webface4m_r100_arcface() -> TrainConfig:
    """The paper's run on WebFace4M with ArcFace, m = 0.4."""
    return _paper("webface4m_r100_arcface", "webface4m", "arcface")


def webface4m_r100_cosface() -> TrainConfig:
    """The paper's run on WebFace4M with CosFace."""
    return _paper("webface4m_r100_cosface", "webface4m", "cosface")


def arcface_torch_ms1mv2() -> TrainConfig:
    """The recipe of insightface's arcface_torch on MS1MV2: m = 0.5, polynomial decay, flip alone (PROTOCOLS 3(f))."""
    return _arcface_torch("arcface_torch_ms1mv2", "ms1mv2", HeadConfig(name="arcface", margin=0.5, scale=64.0))


def arcface_torch_webface4m() -> TrainConfig:
    """The same on WebFace4M, where it takes CosFace."""
    return _arcface_torch("arcface_torch_webface4m", "webface4m", HeadConfig(name="cosface", margin=0.4, scale=64.0))


def ablation(row: str) -> TrainConfig:
    """A row of Tables 1-4: the paper's run on MS1MV2 with one thing changed; ``row`` is a key of `TABLES`."""
    base = _paper(row, "ms1mv2", "arcface")
    return replace(base, model=LGAFConfig(**TABLES[row]))


def compared_head(name: str) -> TrainConfig:
    """The paper's run on MS1MV2 with another head; ``name`` is of `COMPARED_HEADS`."""
    base = _paper(f"head_{name}", "ms1mv2", "arcface")
    return replace(base, head=HeadConfig(name=name))  # type: ignore[arg-type]


def compared_network(name: str) -> TrainConfig:
    """The paper's run on MS1MV2 with another network; ``name`` is a key of `COMPARED_NETWORKS`."""
    base = _paper(f"network_{name}", "ms1mv2", "arcface")
    return replace(base, network=name, **COMPARED_NETWORKS[name])  # type: ignore[arg-type]


def names() -> list[str]:
    """Every name that `preset` takes."""
    return [
        *_RUNS,
        *TABLES,
        *(f"head_{name}" for name in COMPARED_HEADS),
        *(f"network_{name}" for name in COMPARED_NETWORKS),
    ]


def preset(name: str) -> TrainConfig:
    """A named run; ``KeyError`` where there is none of this name."""
    if name in TABLES:
        return ablation(name)
    kind, _, which = name.partition("_")
    if kind == "head" and which in COMPARED_HEADS:
        return compared_head(which)
    if kind == "network" and which in COMPARED_NETWORKS:
        return compared_network(which)
    return _RUNS[name]()


_RUNS: Final[Mapping[str, Callable[[], TrainConfig]]] = {
    function.__name__: function
    for function in (
        demo,
        ms1mv2_r100_arcface,
        ms1mv2_r100_cosface,
        webface4m_r100_arcface,
        webface4m_r100_cosface,
        arcface_torch_ms1mv2,
        arcface_torch_webface4m,
    )
}


def _paper(name: str, data: str, head: Any) -> TrainConfig:
    """LGAF by the paper's recipe: ResNet100, 26 epochs of batch 512, SGD, m = 0.4, s = 64 (PROTOCOLS 3(f))."""
    return TrainConfig(
        preset=name,
        data="",
        benchmarks="",
        num_workers=8,
        epochs=26,
        batch_size=512,
        precision="bfloat16",
        head=HeadConfig(name=head, margin=0.4, scale=64.0),
        stream=StreamConfig(num_streams=64),
        workers=WorkersConfig(use_gpu=True, cpus_per_worker=1.0, checkpoint_every_steps=2000),
        tracking=TrackingConfig(experiment=f"lgaf-{data}", model_name=f"lgaf-{data}"),
    )


def _arcface_torch(name: str, data: str, head: HeadConfig) -> TrainConfig:
    """Its 20 epochs of batch 1,024, in half precision with a gradient norm of at most 5.

    Its network is the global branch alone, without dropout. It also decays norms and biases, which this does not.
    """
    base = _paper(name, data, head.name)
    return replace(
        base,
        epochs=20,
        batch_size=1024,
        precision="float16",
        model=LGAFConfig(branches=("global",), dropout=0.0),
        head=head,
        optimizer=OptimizerConfig(max_norm=5.0),
        schedule=Schedule(kind="polynomial"),
        stream=StreamConfig(num_streams=64, augmentation="flip"),
    )

"""Named runs: each is a function that returns a complete configuration."""

from __future__ import annotations

from lgaf.models import LGAFConfig
from lgaf.optim import SGDConfig
from lgaf.schedule import StepSchedule
from pipeline.config import HeadConfig, PackConfig, TrackingConfig, TrainConfig, WorkersConfig
from pipeline.data.sources import SyntheticConfig
from pipeline.data.stream_plan import StreamConfig


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
        schedule=StepSchedule(warmup=0.05),
        pack=PackConfig(samples_per_shard=256, synthetic=SyntheticConfig(num_identities=100, images_per_identity=16)),
        stream=StreamConfig(num_streams=4, block_rows=128),
        workers=WorkersConfig(checkpoint_every_steps=20),
        tracking=TrackingConfig(experiment="lgaf-demo", model_name="lgaf-demo"),
    )


def webface4m() -> TrainConfig:
    """The paper's run on WebFace4M: ResNet100, ArcFace (m = 0.4, s = 64), 26 epochs of batch 512 (PROTOCOLS 3(f))."""
    return TrainConfig(
        preset="webface4m",
        data="",
        benchmarks="",
        num_workers=8,
        epochs=26,
        batch_size=512,
        precision="bfloat16",
        model=LGAFConfig(),
        head=HeadConfig(name="arcface", margin=0.4, scale=64.0),
        optimizer=SGDConfig(),
        stream=StreamConfig(num_streams=64),
        workers=WorkersConfig(use_gpu=True, cpus_per_worker=1.0, checkpoint_every_steps=2000),
        tracking=TrackingConfig(experiment="lgaf-webface4m", model_name="lgaf-webface4m"),
    )

"""The typed configuration of a run. Names on the command line are these fields' (``--model.backbone tiny``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import tyro

from lgaf.config import require_choice, require_in_range, require_positive
from lgaf.heads.margins import MARGINS, Margin, create_margin
from lgaf.heads.screening import SampleScreening
from lgaf.models import NETWORKS, LGAFConfig
from lgaf.models.peers import CQAFaceConfig, HPDAConfig, LSCNNConfig, TransFaceConfig, URLConfig
from lgaf.optim import OptimizerConfig
from lgaf.schedule import Schedule
from lgaf.step import Precision, StepConfig, check_update_in_backward
from pipeline.data.manifest import DEFAULT_SAMPLES_PER_SHARD
from pipeline.data.order import check_batch
from pipeline.data.sources import SYNTHETIC, SyntheticConfig
from pipeline.data.stream_plan import StreamConfig
from pipeline.tracking.promotion import PromotionPolicy
from pipeline.training.divergence import DivergenceConfig
from pipeline.training.profiling import ProfileConfig
from pipeline.training.warm_start import WarmStart

MarginName = Literal["arcface", "cosface", "combined", "adaface", "magface", "mv_softmax", "curricularface", "uniface"]

NetworkName = Literal["lgaf", "ls_cnn", "hpda", "cqa_face", "transface", "url"]
NetworkSettings = LGAFConfig | LSCNNConfig | HPDAConfig | CQAFaceConfig | TransFaceConfig | URLConfig

# Fields that may differ when a run is resumed: none of them changes what is trained, but where it diverged.
RESUMABLE: Final = frozenset(
    {"storage", "num_workers", "workers", "tracking", "run_name", "promotion", "benchmarks", "divergence", "profile"}
)


# Of `stream`, likewise: how samples come, not which.
RESUMABLE_STREAM: Final = frozenset({"block_rows", "max_bad_images", "cache_dir", "cache_gib"})


def recipe(config: TrainConfig) -> dict[str, Any]:
    """What a run trains, as a dict: a resumed run must agree with it, and a run without a name is named by it."""
    return recipe_of(dataclasses.asdict(config))


def recipe_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a whole configuration that is a dict already."""
    content = {key: value for key, value in settings.items() if key not in RESUMABLE}
    stream = {key: value for key, value in settings["stream"].items() if key not in RESUMABLE_STREAM}
    return content | {"stream": stream}


def flat_settings(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested settings by their names on the command line."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """How a source that is not packed yet is packed."""

    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD
    """Samples of every shard but the last."""
    seed: int = 0
    """Of the shuffle at packing, and of synthetic faces; runs with other training seeds share data and benchmarks."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Size of the synthetic training set (used with --data synthetic)."""
    benchmark_pairs: int = 600
    """Pairs of each synthetic verification set (used with --benchmarks synthetic)."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("pack.samples_per_shard", self.samples_per_shard)
        require_positive("pack.benchmark_pairs", self.benchmark_pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """The margin of the class-sharded head."""

    name: MarginName = "arcface"
    """Margin."""
    margin: float | None = None
    """m, an angle in radians or a cosine, as the margin has it; None: its paper's default (LGAF's paper has 0.4)."""
    scale: float | None = None
    """s; None: its paper's default (LGAF's paper has 64)."""
    options: dict[str, bool | float | str] = field(default_factory=dict)
    """Other fields of the margin, by name: --head.options h 0.333 t_alpha 0.01, --head.options gradient
    straight_through."""
    sample_rate: float = 1.0
    """Share of the other classes that a step looks at (Partial FC); 1: all. From about a million people on, less costs
    little accuracy (insightface takes 0.2 or 0.3)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; statistics are float32 either way."""
    memory_budget_mib: int = 2048
    """Temporary memory of the head. Where batch x classes numbers fit, a quarter of the work is saved."""
    update: Literal["optimizer", "backward"] = "optimizer"
    """What moves the class centres. "backward": they move while their gradient is computed, which then never exists as
    a whole; saves as much memory as the centres take."""

    def __post_init__(self) -> None:
        """Check the fields, the margin's by making it."""
        require_choice("head.name", self.name, MARGINS)
        require_in_range("head.sample_rate", self.sample_rate, 1e-6, 1.0)
        require_choice("head.precision", self.precision, ("float32", "bfloat16"))
        require_in_range("head.memory_budget_mib", self.memory_budget_mib, 1, 1 << 30)
        require_choice("head.update", self.update, ("optimizer", "backward"))
        self.create()

    def create(self) -> Margin:
        """Make the margin."""
        own = [field.name for field in dataclasses.fields(MARGINS[self.name])]  # type: ignore[arg-type]
        if self.margin is not None and "margin" not in own:
            raise ValueError(
                f"head.margin={self.margin!r}: {self.name} has no such field; set --head.margin None and, in "
                f"--head.options, any of: {', '.join(own)}"
            )
        given = {k: v for k, v in {"margin": self.margin, "scale": self.scale}.items() if v is not None}
        if "r" in own and "r" not in self.options:
            given["r"] = self.sample_rate  # UniFace's threshold starts from the number of classes that are seen
        for twice in given.keys() & self.options.keys():
            raise ValueError(f"head.{twice}={given[twice]!r} is in head.options too: {self.options[twice]!r}")
        return create_margin(self.name, **given, **self.options)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersConfig:
    """What the training workers take of the cluster, and how often they save."""

    cpus_per_worker: float = 0.01
    """CPUs that Ray reserves per worker. Next to none (Ray Train refuses 0) leaves those of a small machine to Ray
    Data, which would else wait for ever."""
    use_gpu: bool = False
    """One GPU per worker."""
    threads: int = 0
    """Threads of torch per worker; 0: the machine's cores shared out."""
    checkpoint_every_steps: int = 500
    """Steps between checkpoints; there is one more at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    keep_best_checkpoints: int = 1
    """Of the others, as many stay, those with the lowest mean loss since the one before."""
    storage_patience_s: float = 600.0
    """How long the end of a run waits for a storage that is full or away. Before its end nothing waits: a checkpoint
    that cannot be written is tried again beside the training."""
    log_every_steps: int = 10
    """Steps between writes of metrics (every step has its line all the same)."""
    max_failures: int = 3
    """Restarts of the worker group, from the last checkpoint, before the run fails; -1: any number."""
    hang_timeout_s: float = 1800.0
    """A group of workers in which none got on for so long is started again, with a word on who held it up; 0: never.
    Longer than any step, compilation, load or attempt to write takes."""
    resize_interval_s: float = 60.0
    """With two numbers of workers: how often the cluster is looked at for room."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in (
            "cpus_per_worker",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "log_every_steps",
            "storage_patience_s",
            "resize_interval_s",
        ):
            require_positive(f"workers.{name}", getattr(self, name))
        require_in_range("workers.threads", self.threads, 0, 1024)
        require_in_range("workers.keep_best_checkpoints", self.keep_best_checkpoints, 0, 1 << 20)
        require_in_range("workers.max_failures", self.max_failures, -1, 1 << 30)
        require_in_range("workers.hang_timeout_s", self.hang_timeout_s, 0, 1e9)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """MLflow."""

    uri: str = ""
    """Tracking URI; empty: sqlite beside the outputs, or MLFLOW_TRACKING_URI."""
    experiment: str = "lgaf"
    """Experiment of the runs."""
    model_name: str = "lgaf"
    """Name in the model registry; champions are compared under one name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole run: data, network, recipe, evaluation, promotion. Presets (`pipeline.presets`) make these."""

    preset: tyro.conf.Suppress[str]
    data: str = SYNTHETIC
    """Training data: a packed data set, any source that can be packed (docs/data.md), or the word synthetic."""
    mix: dict[str, float] = field(default_factory=dict)
    """Further data sets to train on at once, each with how often an epoch sees it (1: once):
    --mix s3://faces/ms1mv2 1 s3://faces/glint 0.5. Their people are counted after those of --data."""
    benchmarks: str = SYNTHETIC
    """Verification sets: a folder with .bin files, one such file, or the word synthetic."""
    storage: str = "outputs"
    """Where everything goes: a folder or URI (file://, s3://)."""
    run_name: str = ""
    """Name of the run; the same name resumes it. Empty: the preset and a digest of the configuration."""
    num_workers: int | tuple[int, int] = 2
    """Training workers; the samples of each global batch do not depend on it. Two numbers: as many as the cluster has
    room for, at least the first and at most the second; they may become fewer and more while the run goes on."""
    seed: int = 0
    """Of everything random in training: weights, order, augmentation, dropout."""
    epochs: int = 26
    """Passes over the data."""
    batch_size: int = 512
    """Global batch, over all workers."""
    precision: Precision = "float32"
    """Of the network's forward pass."""
    pack: PackConfig = field(default_factory=PackConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    network: NetworkName = "lgaf"
    """Network: LGAF, or one that the paper compares with (whose own settings then are those of --model, at its paper's
    size)."""
    model: tyro.conf.AvoidSubcommands[NetworkSettings] = field(default_factory=LGAFConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    warm_start: WarmStart = field(default_factory=WarmStart)
    screening: SampleScreening = field(default_factory=lambda: SampleScreening(strength=0.0))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Schedule = field(default_factory=Schedule)
    step: StepConfig = field(default_factory=StepConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    promotion: PromotionPolicy = field(default_factory=PromotionPolicy)

    def __post_init__(self) -> None:
        """Check what no single part can; ``ValueError`` names the field, its value and what is valid."""
        for name in ("epochs", "batch_size"):
            require_positive(name, getattr(self, name))
        require_positive("num_workers", self.fewest_workers)
        if self.fewest_workers > self.most_workers:
            raise ValueError(
                f"num_workers={self.num_workers} must be a number, or the fewest and then the most workers"
            )
        require_choice("network", self.network, NETWORKS)
        if type(self.model) is not NETWORKS[self.network]:
            raise ValueError(f"network={self.network!r} goes with a {NETWORKS[self.network].__name__} as model")
        require_in_range("seed", self.seed, 0, 2**32 - 1)
        require_choice("precision", self.precision, ("float32", "bfloat16", "float16"))
        skips = self.divergence.policy == "skip"
        check_update_in_backward(self.head.update == "backward", self.precision, self.step, skips)
        if self.head.update == "backward" and (self.optimizer.kind != "sgd" or self.optimizer.max_norm):
            raise ValueError(
                f"head.update='backward' goes with optimizer.kind='sgd' and optimizer.max_norm=0, not "
                f"{self.optimizer.kind!r} and {self.optimizer.max_norm}"
            )
        check_batch(self.batch_size, self.stream.num_streams, self.most_workers)
        share = self.batch_size // self.most_workers
        if self.step.accumulate > max(1, share // 2):  # batch norm needs two samples
            raise ValueError(
                f"step.accumulate={self.step.accumulate} leaves less than two samples a part of the {share} of a batch "
                f"that each of num_workers={self.num_workers} has"
            )
        if self.step.gradient_compression == "bfloat16" and not self.workers.use_gpu:
            raise ValueError("step.gradient_compression='bfloat16' needs workers.use_gpu; float16 does not")
        if self.step.sync_batch_norm and not self.workers.use_gpu:
            raise ValueError(
                "step.sync_batch_norm=True needs workers.use_gpu: torch's SyncBatchNorm trains on GPUs alone"
            )
        if set(self.run_name) & set("/\\ :") or self.run_name in (".", ".."):
            raise ValueError(f"run_name={self.run_name!r} must be usable as a folder name: no slash, colon or space")

    @property
    def fewest_workers(self) -> int:
        """Workers that a run needs."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Workers that a run takes."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

"""The card of an exported model: ``README.md`` beside the weights, in the form of Hugging Face's model cards.

It is written when the model is exported; what the model scores is put in once it is known. Of places on the machine it
names the data's URI alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from pipeline import storage
from pipeline.config import TrainConfig, recipe

if TYPE_CHECKING:  # it loads matplotlib, which a training worker has no use for
    from pipeline.evaluation.report import BenchmarkResult, EvalReport

CARD: Final = "README.md"

# Between these lines stands what the evaluation fills in; a comment of YAML, and of Markdown.
_RESULTS = ("# results", "# end of results")
_SCORES = ("<!-- scores -->", "<!-- end of scores -->")
_NOT_YET = "Not evaluated yet."
# Parts of a configuration that say how the weights came about; places (data, warm start) and the network stand apart.
_RECIPE = ("epochs", "batch_size", "precision", "stream", "head", "screening", "optimizer", "schedule", "step")

_TEXT: Final = """\
---
library_name: lgaf
pipeline_tag: image-feature-extraction
tags:
- face-recognition
- face-verification
- pytorch
{results}
---

# {title}

A face recognition network: it turns the crop of an aligned face into an embedding, so that crops of one person are
close and those of different people far apart. {what}Trained with LGAF on Ray.

| | |
|---|---|
| network | `{network}`{backbone}, {num_parameters:,} parameters |
| input | float32 `[B, 3, 112, 112]`: RGB, in [-1, 1] (pixels / 127.5 - 1), aligned by five landmarks as for ArcFace |
| embedding | `[B, {embedding_dim}]`, not normalised |
| comparison | cosine similarity of two embeddings; higher is more alike. Choose the threshold on pairs of your own |
| weights | `model.safetensors`, SHA-256 `{fingerprint}` |

## Use

```python
import torch
from lgaf import load_exported

model = load_exported(".")  # the folder of this file; in eval mode, on the CPU
faces = torch.rand(2, 3, 112, 112) * 2 - 1  # two crops, RGB in [-1, 1]
with torch.inference_mode():
    embeddings = torch.nn.functional.normalize(model(faces).embedding_BD, dim=1)
similarity = float(embeddings[0] @ embeddings[1])
```

The package `lgaf` needs torch, numpy and safetensors, nothing else.

## Training

| | |
|---|---|
| data | {data_uri} |
| fingerprint of the data | `{data_fingerprint}` |
| samples, people | {num_samples:,}, {num_classes:,} |
| started from | {started_from} |
| steps | {num_steps:,} |
| seed | {seed} |
| preset | `{preset}` |

Recipe:

{recipe}

Network:

{settings}

## Evaluation

{scores}

## Intended use and limits

For research on face recognition: verification of two crops, and search among embeddings of this same model. Embeddings
of different models, and of one model before and after more training, cannot be compared.

- Nobody has measured how its errors are spread over age, sex or skin. Do so, on people like yours, before any use that
  matters to someone.
- The figures above hold for those benchmarks' pairs. Detection and alignment that differ from the training data's cost
  accuracy, and nothing here tells a live face from a picture of one.
- It is not made for surveillance of people, nor to guess what they are like.
- Which terms hold for the weights depends on those of the data that they were trained on.
"""


class TrainingData(Protocol):
    """What a card tells of training data; a `Manifest` or a `Mixture`."""

    @property
    def uri(self) -> str:
        """Their place."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 over their content."""
        ...

    @property
    def num_samples(self) -> int:
        """Distinct samples."""
        ...

    @property
    def num_classes(self) -> int:
        """People."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What was exported.

    Attributes:
        fingerprint: SHA-256 of the weights.
        num_parameters: Numbers that training moves.
        num_steps: Steps of the run.
        started_from: The model that the run's weights were first; empty: fresh ones.
    """

    fingerprint: str
    num_parameters: int
    num_steps: int
    started_from: str = ""


def write_card(model_uri: str, config: TrainConfig, data: TrainingData, export: Export) -> None:
    """Write the card of a model that was just exported to the folder ``model_uri``, without scores."""
    storage.write_bytes(storage.join(model_uri, CARD), _card(config, data, export).encode())


def awaits_evaluation(model_uri: str) -> bool:
    """Whether a model has a card that lacks its scores."""
    uri = storage.join(model_uri, CARD)
    return storage.exists(uri) and _NOT_YET in storage.read_bytes(uri).decode()


def add_evaluation(model_uri: str, report: EvalReport) -> None:
    """Put a report's scores into a model's card, in place of those that are there; an absent card stays absent."""
    uri = storage.join(model_uri, CARD)
    if not storage.exists(uri):  # a model of a version that wrote none
        return
    text = storage.read_bytes(uri).decode()
    title = re.search(r"^# (?!results|end of)(.*)$", text, flags=re.MULTILINE)
    text = _between(text, _RESULTS, _model_index(title[1] if title else "model", report))
    text = _between(text, _SCORES, _table(report))
    storage.write_bytes(uri, text.encode())


def _card(config: TrainConfig, data: TrainingData, export: Export) -> str:
    settings = asdict(config.model)
    backbone = settings.get("backbone")
    averaged = f"The weights are a moving average over the steps, of factor {config.step.ema_decay:g}. "
    return _TEXT.format(
        results="\n".join(_RESULTS),
        title=config.run_name,
        what=averaged if config.step.ema_decay else "",
        network=config.network,
        backbone=f" on `{backbone}`" if backbone else "",
        num_parameters=export.num_parameters,
        embedding_dim=config.model.output_dim,
        fingerprint=export.fingerprint,
        data_uri=f"`{data.uri}`",
        data_fingerprint=data.fingerprint,
        num_samples=data.num_samples,
        num_classes=data.num_classes,
        started_from=export.started_from or "fresh weights",
        num_steps=export.num_steps,
        seed=config.seed,
        preset=config.preset,
        recipe=_settings({name: value for name, value in recipe(config).items() if name in _RECIPE}),
        settings=_settings({"model": settings}),
        scores="\n".join((_SCORES[0], _NOT_YET, _SCORES[1])),
    )


def _settings(values: Mapping[str, Any]) -> str:
    """Nested settings, a line each, by their names on the command line."""

    def lines(value: object, name: str) -> list[str]:
        if isinstance(value, Mapping):
            return [line for key, inner in value.items() for line in lines(inner, f"{name}.{key}" if name else key)]
        return [f"{name} = {json.dumps(value)}"]

    return "\n".join(("```text", *lines(values, ""), "```"))


def _table(report: EvalReport) -> str:
    rates = list(dict.fromkeys(far for result in report.benchmarks for far in result.tar_at_far))
    header = ["benchmark", "pairs", "accuracy", *(f"TAR@FAR={far}" for far in rates)]
    rows = [_row(result, rates) for result in report.benchmarks]
    lines = [header, ["---"] * len(header), *rows]
    told = "Accuracy: mean and standard deviation over the folds of the protocol, in percent; with the flip test."
    return "\n".join([told, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _row(result: BenchmarkResult, rates: list[str]) -> list[str]:
    accuracy = f"{100 * result.accuracy:.2f} ± {100 * result.accuracy_std:.2f}"
    shares = (f"{100 * result.tar_at_far[far]:.2f}" if far in result.tar_at_far else "" for far in rates)
    return [result.name, f"{result.num_pairs:,}", accuracy, *shares]


def _model_index(name: str, report: EvalReport) -> str:
    """The scores as Hugging Face's metadata has them. JSON is YAML, and knows how to quote."""
    results = [
        {
            "task": {"type": "face-verification", "name": "Face verification"},
            "dataset": {"type": result.name, "name": result.name},
            "metrics": [{"type": "accuracy", "name": "Accuracy", "value": round(result.accuracy, 6)}]
            + [
                {"type": "tar", "name": f"TAR@FAR={far}", "value": round(share, 6)}
                for far, share in result.tar_at_far.items()
            ],
        }
        for result in report.benchmarks
    ]
    text = json.dumps([{"name": name, "results": results}], indent=1, ensure_ascii=False)
    return "model-index: " + text.replace("\n", "\n  ")  # what belongs to a key of YAML stands further in than it


def _between(text: str, markers: tuple[str, str], content: str) -> str:
    """Replace what stands between two marker lines; a card whose markers somebody took out is left as it is."""
    pattern = rf"(?<=^{re.escape(markers[0])}\n).*?(?=^{re.escape(markers[1])}$)"
    return re.sub(pattern, lambda _: f"{content}\n", text, count=1, flags=re.MULTILINE | re.DOTALL)

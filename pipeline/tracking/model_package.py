"""The MLflow package of an exported model: weights, the code that runs them, signature and requirements."""

from __future__ import annotations

import os
import tempfile
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Final

import mlflow.artifacts
import mlflow.pyfunc
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

FINGERPRINT_TAG: Final = "model_fingerprint"

_CODE_FILE = Path(__file__).with_name("pyfunc_model.py")
_CODE_ROOT = Path(__file__).resolve().parents[2]
# What `pipeline.model_store` imports. Given explicitly: MLflow's inference would load the model in a new process.
_REQUIREMENTS = ("mlflow", "numpy", "pyarrow", "safetensors", "torch")


def log_model(registry: MlflowClient, run_id: str, model_dir: Path, embedding_dim: int, tags: dict[str, str]) -> str:
    """Upload the model with its code as a logged model of the run; give its id.

    `mlflow.pyfunc.log_model` would do these steps in the global store, and read the whole history of every metric.
    """
    experiment_id = registry.get_run(run_id).info.experiment_id
    same = f"source_run_id = '{run_id}' AND tags.{FINGERPRINT_TAG} = '{tags[FINGERPRINT_TAG]}'"
    for earlier in registry.search_logged_models([experiment_id], filter_string=same):
        if earlier.status == "READY":  # a job that was killed between upload and registration
            return str(earlier.model_id)
    logged = registry.create_logged_model(experiment_id, name="model", source_run_id=run_id, tags=tags)
    with tempfile.TemporaryDirectory() as folder:
        _save_pyfunc(Path(folder) / "model", model_dir, embedding_dim, run_id, logged.model_id)
        registry.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
    registry.finalize_logged_model(logged.model_id, "READY")
    registry.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return str(logged.model_id)


def _save_pyfunc(target: Path, model_dir: Path, embedding_dim: int, run_id: str, model_id: str) -> None:
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # else a uv.lock of the current folder becomes part of it
    with warnings.catch_warnings():
        # An example input would be run through the model to guess the signature that is given here.
        warnings.filterwarnings("ignore", message=".*input example was not provided.*")
        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(_CODE_FILE),
            artifacts={"model": str(model_dir.resolve())},
            code_paths=[str(_CODE_ROOT / "lgaf"), str(_CODE_ROOT / "pipeline")],
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 3, 112, 112))]),
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, embedding_dim))]),
            ),
            # Without the local part (+cpu): the loading machine chooses its own build of torch.
            pip_requirements=[f"{name}=={installed_version(name).split('+')[0]}" for name in _REQUIREMENTS],
            mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
        )


def download_model(tracking_uri: str, package_uri: str, target: Path) -> Path:
    """Download a package and give the exported model's folder inside it."""
    folder = mlflow.artifacts.download_artifacts(
        artifact_uri=package_uri, dst_path=str(target), tracking_uri=tracking_uri
    )
    stored = Model.load(folder).flavors[mlflow.pyfunc.FLAVOR_NAME]["artifacts"]["model"]
    return Path(folder) / str(stored["path"])

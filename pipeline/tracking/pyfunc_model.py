"""The registered model's code, stored beside its weights ("models from code"): nothing of ours is ever unpickled.

MLflow runs this file both when the model is logged and in the process that loads it, where the folders ``lgaf`` and
``pipeline`` that were stored with the model are importable.

Legend: B faces, D embedding.
"""

from __future__ import annotations

from typing import Any

import mlflow.models
import numpy as np
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext


class FaceEmbedder(PythonModel):
    """Aligned 112x112 RGB faces in [-1, 1], ``[B, 3, 112, 112]`` float32, to unit vectors ``[B, D]`` float32."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the exported model that was stored as the artifact ``model``."""
        # Not at the top of the file: logging a model then needs neither the network's code nor its imports.
        from pipeline.model_store import load_model

        self._model = load_model(context.artifacts["model"])

    # np.ndarray is one of the few annotations that MLflow takes without trying to make a schema of it.
    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Embed a batch of faces; the embeddings are L2-normalised."""
        images_BCHW = torch.from_numpy(np.array(model_input, dtype=np.float32))
        with torch.inference_mode():
            embedding_BD = self._model(images_BCHW).embedding_BD
            return torch.nn.functional.normalize(embedding_BD.float(), dim=1).numpy()


mlflow.models.set_model(FaceEmbedder())

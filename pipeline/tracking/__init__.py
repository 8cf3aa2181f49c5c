"""MLflow: runs, registry, promotion. The only place that knows it."""

import os

# MLflow reads this when it is imported; a training cluster reports to nobody.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

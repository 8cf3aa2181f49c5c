"""MLflow: runs, registry, promotion. The only place that knows it."""

"""The machinery: data, training, evaluation and tracking on Ray and MLflow."""

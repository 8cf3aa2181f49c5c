"""From any face data set to training batches."""

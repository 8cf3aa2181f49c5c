"""Names under which a profiler sees the parts of a training step (`torch.profiler.record_function`).

What is not inside one of them is the loop's own work. A name costs a few microseconds a call where nobody profiles.
"""

from __future__ import annotations

from typing import Final

DATA_WAIT: Final = "lgaf/data_wait"
"""The loop waits for its next batch."""
FORWARD: Final = "lgaf/forward"
"""Images to the device, the network's forward pass."""
HEAD: Final = "lgaf/head"
"""The head's forward pass."""
BACKWARD: Final = "lgaf/backward"
"""The backward pass of head and network."""
OPTIMIZER: Final = "lgaf/optimizer"
"""Clipping, update of the weights and of their average."""
CHECKPOINT: Final = "lgaf/checkpoint"
"""A checkpoint is written."""

PHASES: Final = (DATA_WAIT, FORWARD, HEAD, BACKWARD, OPTIMIZER, CHECKPOINT)
"""All of them; they never lie within each other."""

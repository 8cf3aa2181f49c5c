"""Released weights as files: read those of insightface and AdaFace, and write them as an exported model.

``python -m pipeline.released --weights FILE --form insightface|adaface --output URI``
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import safetensors.torch
import torch
import tyro
from rich.console import Console

from lgaf.models import LGAF
from lgaf.models.released import ChannelOrder, ReleasedForm, from_released
from pipeline import storage
from pipeline.model_store import save_model

SAFETENSORS: Final = ".safetensors"
# Lightning before 1.5, which AdaFace's trainer also runs on, saves a callback's state under the callback's class.
LIGHTNING_CALLBACK: Final = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class _StandIn:
    """Takes the place of a class that a checkpoint names beside its weights: nothing is imported or run for it."""


def read_released(uri: str) -> Mapping[str, Any]:
    """Read a checkpoint: tensors and plain values alone, nothing that a pickle could run.

    Beside tensors these may be in it: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, set, dict,
    OrderedDict, Counter, torch.Size, dtypes and devices. Namespaces, paths, NumPy values, enums and defaultdicts may
    not, and no class but Lightning's `ModelCheckpoint`.

    Args:
        uri: A file of ``torch.save``, or a safetensors file, which its name says.

    Raises:
        StorageError: It does not exist, holds something else, or is no such file; the message says what to do.
    """
    content = storage.read_bytes(uri)
    _check_sums(uri, content)
    try:
        if uri.endswith(SAFETENSORS):
            return safetensors.torch.load(content)
        with torch.serialization.safe_globals([(_StandIn, LIGHTNING_CALLBACK)]):
            checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, whatever the bytes lead the readers to
        raise storage.StorageError(f"{uri}: {_why(error)}") from error
    if not isinstance(checkpoint, Mapping):
        raise storage.StorageError(f"{uri}: holds a {type(checkpoint).__name__}, a state dict was expected")
    return checkpoint


def _check_sums(uri: str, content: bytes) -> None:
    """Files of torch.save are zip archives, whose checksums torch does not look at."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
    except zipfile.BadZipFile as error:
        raise storage.StorageError(f"{uri}: is damaged: {error}") from error
    if damaged is not None:
        raise storage.StorageError(f"{uri}: is damaged: the checksum of {damaged} in it is wrong")


def load_released(uri: str, form: ReleasedForm, *, channel_order: ChannelOrder | None = None) -> LGAF:
    """Read released weights into our network, which takes RGB: in eval mode, on the CPU, in float32.

    Args:
        uri: The file, as for `read_released`.
        form: Whose network it is: "insightface" or "adaface".
        channel_order: What the released network takes; None: what the networks of that form do.

    Raises:
        StorageError: The file cannot be read; the message names it.
        ValueError: It holds no weights of that form; the message names the file and what differs.
    """
    checkpoint = read_released(uri)
    try:
        config, state = from_released(form, checkpoint, channel_order=channel_order)
    except ValueError as error:
        raise ValueError(f"{uri}: {error}") from None  # the innermost error is what a user is told
    model = config.build()
    model.load_state_dict(state)
    return model.eval()


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedArguments:
    """Turn released weights of insightface or AdaFace into an exported model, which takes RGB."""

    weights: str
    """The file: of torch.save, or .safetensors."""
    form: ReleasedForm
    """Whose network it is."""
    output: str
    """Folder or URI for the model."""
    channel_order: ChannelOrder | None = None
    """What the released network takes; if not given, rgb for insightface and bgr for adaface."""


def convert_job(arguments: list[str] | None = None) -> int:
    """Entry point of the conversion; gives the exit code."""
    from pipeline.cli import run_job  # the command line alone needs it, with all of Ray

    def job() -> None:
        wanted = tyro.cli(ReleasedArguments, args=arguments)
        model = load_released(wanted.weights, wanted.form, channel_order=wanted.channel_order)
        fingerprint = save_model(wanted.output, model.config, model.state_dict())
        told = f"{model.config.backbone}, {model.config.embedding_dim} dimensions, sha256 {fingerprint[:12]}"
        Console().print(f"{storage.normalise(wanted.output)}: {told}", soft_wrap=True, highlight=False)

    return run_job(job)


def _why(error: Exception) -> str:
    """What is wrong with the file, and what to do."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        package = named[1].split(".")[0]
        return (
            f"needs {named[1]} beside its tensors; reading that could run any code, so it is not read. If you trust "
            f'the file, write its weights alone where {package} is installed: python -c "import torch; c = '
            "torch.load('FILE', map_location='cpu', weights_only=False); torch.save(c.get('state_dict', c), 'NEW')\""
        )
    if "TorchScript" in str(error):
        return "is a TorchScript archive, a program; write its weights alone with torch.save(model.state_dict(), 'NEW')"
    reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines() or [type(error).__name__]
    return f"is not a file of torch.save, or is damaged: {reason[0]}"


if __name__ == "__main__":
    raise SystemExit(convert_job())

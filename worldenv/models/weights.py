"""Weights of published models: read from the disk as they lie there, checked, and put in place.

Nothing is copied that need not be: files are memory-mapped, and a module built on `meta` takes the
mapped tensors themselves. Pickles are opened for tensors only.
"""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from worldenv.runtime import checkpoint
from worldenv.runtime.errors import UserError

# What torch's reader ends in where a file is not what it was.
_DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error)
_AGAIN = "Download it again, or name the folder of another model."


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, memory-mapped. UserError for a damaged one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        size = f"{path.stat().st_size:,} bytes"
        raise UserError(f"{path} ({size}) is truncated or no safetensors: {error}. {_AGAIN}") from (
            error
        )
    except OSError as error:
        raise checkpoint.read_error(path, error) from error


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, memory-mapped where its format allows, under its names.

    A table that holds the weights as "model_state_dict" is unwrapped. UserError for a damaged file,
    for one that holds code, and for one that holds no table of tensors.
    """
    try:
        # Before torch 1.6 files were plain pickles, which cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: expected tensors alone, got a pickle that asks for code or is damaged: "
            f"{_first(error)} Such a file is not opened. If you trust its author, load it "
            "elsewhere and save its state dict by itself."
        ) from error
    except OSError as error:
        raise checkpoint.read_error(path, error) from error
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged: {_first(error)} {_AGAIN}") from error
    if isinstance(held, dict):
        held = held.get("model_state_dict", held)
    if not isinstance(held, dict) or not held:
        raise UserError(f"{path}: expected a table of tensors, got {_what(held)}. {_AGAIN}")
    for name, tensor in held.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name!r}: expected a tensor, got {_what(tensor)}. {_AGAIN}")
    return dict(held)


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Give `module`, which may be on `meta`, the `tensors` read from `source` as its own.

    dtype: what floating point tensors become (None: they stay as they are, which copies nothing).
    UserError for missing, unexpected and misshapen tensors and for NaN or infinity among them;
    `module` is untouched then.
    """
    kind = type(module).__name__
    checkpoint.check_fit(module.state_dict(), tensors, source, kind, mend=_AGAIN)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{source}: {name}: expected finite numbers, got NaN or inf. {_AGAIN}")
    own = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    module.load_state_dict(own, assign=True)


def _first(error: Exception) -> str:
    """The first sentence of torch's long messages that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "nsupported" in line]
    return (telling or lines or [type(error).__name__])[0].split("Please")[0].rstrip(" .") + "."


def _what(value: object) -> str:
    return "an empty table" if value == {} else f"a {type(value).__name__}"

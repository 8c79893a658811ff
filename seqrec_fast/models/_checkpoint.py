"""One file a model: weights in safetensors, what the model is made of in the file's metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from seqrec_fast._files import written_beside

KIND = "seqrec_fast.model"
CONFIG = "seqrec_fast.config"

Self = TypeVar("Self", bound="SavedModule")


class SavedModule(nn.Module):
    """A module that writes itself into one file and is read back exactly, dtype included.

    A subclass gives :meth:`config_dict` and :meth:`from_config_dict`; it is registered under its class name.
    """

    registry: ClassVar[dict[str, type[SavedModule]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        SavedModule.registry[cls.__name__] = cls

    def config_dict(self) -> dict[str, Any]:
        """What the model is made of, as values JSON can hold."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is made of")

    @classmethod
    def from_config_dict(cls: type[Self], config: Mapping[str, Any]) -> Self:
        """A model with the same modules and shapes; its weights are whatever they start as."""
        raise NotImplementedError(f"{cls.__name__} cannot be made from a configuration")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and configuration to ``path`` (safetensors). The file is whole or absent."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"format": "pt", KIND: type(self).__name__, CONFIG: json.dumps(self.config_dict())}
        with written_beside(path) as part:
            save_file(tensors, part, metadata=metadata)

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Self:
        """Read a model written by :meth:`save`, in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a safetensors file, no model of this package, a model of another class, or weights that do
                not fit the configuration beside them.
        """
        kind, config, tensors = _read(path, device)
        if kind not in SavedModule.registry:
            raise ValueError(f"{path} holds a {kind}, which this version of seqrec_fast does not know")
        found = SavedModule.registry[kind]
        if not issubclass(found, cls):
            raise ValueError(f"{path} holds a {kind}, not a {cls.__name__}")
        with torch.device("meta"):  # no memory for weights that are replaced at once
            model = found.from_config_dict(config)
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} holds weights that do not fit its own configuration: {reason}") from error
        return model.eval()


def _read(
    path: str | os.PathLike[str], device: str | torch.device
) -> tuple[str, Mapping[str, Any], dict[str, torch.Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no model file {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if KIND not in metadata or CONFIG not in metadata:
                raise ValueError(
                    f"{path} was not written by seqrec_fast: its metadata does not say which model it holds"
                )
            return metadata[KIND], json.loads(metadata[CONFIG]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> SavedModule:
    """Read whichever model of this package ``path`` holds, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: as :meth:`SavedModule.load`.
    """
    return SavedModule.load(path, device)

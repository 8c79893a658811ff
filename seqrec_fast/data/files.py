"""Interactions in one ``.npz`` file: the form a converted data set is kept in."""

from __future__ import annotations

import zipfile
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import written_beside
from .interactions import DataError, Histories, Interactions

FORMAT = 1


def save_interactions(data: Interactions, path: str | PathLike[str]) -> None:
    """Write ``data`` to ``path``; an existing file is replaced only once the new one is complete."""
    if Path(path).suffix != ".npz":
        raise ValueError(f'path must end in ".npz", got {str(path)!r}')
    with written_beside(path) as part:
        arrays: dict[str, Any] = {
            "format": np.int64(FORMAT),
            "items": data.histories.items,
            "offsets": data.histories.offsets,
            "source": np.array(data.source),
            "sha256": np.array(data.sha256),
        }
        np.savez(part, **arrays, **_packed("user", data.user_ids), **_packed("item", data.item_ids))


def load_interactions(path: Path) -> Interactions:
    """Read what ``save_interactions`` wrote; DataError when it is something else."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not a complete file written by Interactions.save")
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["format"]) != FORMAT:
                raise DataError(
                    f"{path}: made by another version (format {int(file['format'])}, this one reads {FORMAT})"
                )
            histories = Histories(file["items"], file["offsets"])
            user_ids, item_ids = _unpacked("user", file), _unpacked("item", file)
            return Interactions(histories, user_ids, item_ids, str(file["source"]), str(file["sha256"]))
    except (OSError, KeyError, EOFError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a complete file written by Interactions.save ({error})") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a file written by Interactions.save ({error})") from error


def _packed(name: str, ids: NDArray[Any]) -> dict[str, Any]:
    """Integer ids as they are; text as one UTF-8 blob and its offsets (numpy's own text pads all to the longest)."""
    if ids.dtype == np.int64:
        return {f"{name}_ids": ids}
    encoded = [text.encode() for text in ids.tolist()]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return {f"{name}_text": np.frombuffer(b"".join(encoded), dtype=np.uint8), f"{name}_ends": ends}


def _unpacked(name: str, file: Any) -> NDArray[Any]:
    if f"{name}_ids" in file:
        ids: NDArray[Any] = file[f"{name}_ids"]
        return ids
    blob, ends = file[f"{name}_text"].tobytes(), file[f"{name}_ends"].tolist()
    text = np.empty(len(ends), dtype=object)
    text[:] = [blob[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return text

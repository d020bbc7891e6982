"""The safetensors files of a model folder, known by their headers: a plain value, no torch.

A header says for each tensor its type, shape and place, so that everything that can be wrong with a checkpoint short
of damaged numbers is found in milliseconds, before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import CheckpointError

__all__ = ["Checkpoint", "TensorEntry"]

_FLOAT_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_MAX_HEADER_BYTES = 100_000_000
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 256
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. `dtype` is safetensors' word; `begin` and `end` are byte offsets in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a model folder.

    Attributes:
        folder: the model folder.
        files: its safetensors files in order of name.
        entries: name -> where it lies.
    """

    folder: Path
    files: tuple[Path, ...]
    entries: Mapping[str, TensorEntry]

    @classmethod
    def from_dir(cls, path: str | Path) -> Checkpoint:
        """Read the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

        Raises:
            CheckpointError: no such files, a shard is missing, truncated or damaged; names the file and the tensor.
        """
        folder = Path(path)
        if (folder / _SINGLE_FILE).exists():
            return cls(folder, (folder / _SINGLE_FILE,), _read_header(folder / _SINGLE_FILE))
        if (folder / _INDEX_FILE).exists():
            return _read_shards(folder)
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        hint = f"; {pickled[0]} is a pickle and is not read, convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{folder} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}{hint}")

    def verify(self, expected: Mapping[str, tuple[int, ...]], optional: frozenset[str] = frozenset()) -> None:
        """Compare names, shapes and types with what the model needs.

        Args:
            expected: name -> shape of every tensor that the model reads.
            optional: names that may be there or not; their shape is checked where they are.

        Raises:
            CheckpointError: on the first tensor that is missing, unexpected, of another shape or not floating point.
        """
        for name, shape in expected.items():
            entry = self.entries.get(name)
            if entry is None:
                if name in optional:
                    continue
                raise CheckpointError(f"{self.folder}: tensor {name} {list(shape)} is missing; config.json asks for it")
            if entry.shape != shape:
                raise CheckpointError(
                    f"{entry.file}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}"
                )
            if entry.dtype not in _FLOAT_BYTES:
                raise CheckpointError(
                    f"{entry.file}: tensor {name} is of type {entry.dtype}; supported: {', '.join(_FLOAT_BYTES)}"
                )
        for name, entry in self.entries.items():
            # Old checkpoints store the rotary frequencies, which are a function of the config.
            if name not in expected and not name.endswith("rotary_emb.inv_freq"):
                raise CheckpointError(f"{entry.file}: tensor {name} {list(entry.shape)} is unexpected")

    def digest(self) -> str:
        """Cheap identity of the weights: headers, sizes, and 4 KiB samples spread evenly over each file."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name}/{entry.dtype}/{entry.shape}/{entry.num_bytes};".encode())
        for file in self.files:
            size = file.stat().st_size
            digest.update(f"{size};".encode())
            step = max(_SAMPLE_BYTES, size // _NUM_SAMPLES)
            with file.open("rb") as stream:
                for offset in range(0, size, step):
                    stream.seek(offset)
                    digest.update(stream.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def _read_shards(folder: Path) -> Checkpoint:
    index_file = folder / _INDEX_FILE
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_file} is damaged: {error!r}") from error
    entries: dict[str, TensorEntry] = {}
    files = sorted(set(names.values()))
    for file_name in files:
        if Path(file_name).name != file_name:
            raise CheckpointError(f"{index_file}: shard {file_name!r} must be a plain file name")
        if not (folder / file_name).exists():
            example = next(name for name, file in names.items() if file == file_name)
            raise CheckpointError(f"{folder / file_name} is missing; {index_file.name} says it holds {example}")
        for name, entry in _read_header(folder / file_name).items():
            if name in entries:
                raise CheckpointError(f"{entry.file}: tensor {name} is also in {entries[name].file.name}")
            entries[name] = entry
    for name, file_name in names.items():
        if name not in entries or entries[name].file.name != file_name:
            raise CheckpointError(f"{folder / file_name}: tensor {name} is missing; {index_file.name} says it is there")
    return Checkpoint(folder, tuple(folder / file for file in files), entries)


def _read_header(file: Path) -> dict[str, TensorEntry]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is truncated or damaged: no valid safetensors header in {size} bytes")
            header = json.loads(stream.read(header_bytes))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: its safetensors header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is damaged: its safetensors header is not an object")
    header.pop("__metadata__", None)
    return {name: _parse_entry(file, size, 8 + header_bytes, name, fields) for name, fields in header.items()}


def _parse_entry(file: Path, file_bytes: int, data_begin: int, name: str, fields: Any) -> TensorEntry:
    try:
        dtype, shape = str(fields["dtype"]), tuple(int(n) for n in fields["shape"])
        begin, end = (data_begin + int(offset) for offset in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: header entry of tensor {name}: {error!r}") from error
    if end > file_bytes:
        raise CheckpointError(f"{file} is truncated: tensor {name} ends at byte {end}, the file at {file_bytes}")
    itemsize = _FLOAT_BYTES.get(dtype)
    if begin < data_begin or end < begin or (itemsize is not None and end - begin != itemsize * math.prod(shape)):
        raise CheckpointError(f"{file} is damaged: tensor {name} {list(shape)} of {dtype} takes {end - begin} bytes")
    return TensorEntry(file, dtype, shape, begin, end)

"""The trunk's tensors of images, kept on disk: in masked mode they do not depend on what is trained.

An entry is a safetensors file. Its folder is named by a digest of all that the tensors depend on beside the image (the
backbone's values, its attention kernel, the transform, the precision), its name is the digest of the image: what has
changed has another place, so that entries are never out of date. A file is written beside its place and renamed into
it, so that any number of processes can share a folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..backbones import Backbone, stored_parts
from ..errors import ConfigError
from ..streams import Grid, Pass, TrunkBlock

FORMAT_VERSION = 3

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""What keys and values can be kept as; int8 with a scale for each token and head."""

CacheType: TypeAlias = Literal["float32", "float16", "bfloat16", "int8"]

Entry: TypeAlias = dict[str, Tensor]
"""Of one image: `keys` and `values` (blocks, tokens, heads, head width), `query` (width), `grid` (3: a `Grid`);
where the blocks have a bias `bias` (blocks, heads, 1, tokens); of int8 `keys_scale` and `values_scale` (blocks, tokens,
heads, 1)."""

_NOT_OF_THE_TRUNK = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type")
_NOT_OF_THE_TRUNK += ("torch_dtype", "transformers_version")

_checked: set[tuple[str, int, int]] = set()
"""Entries that this process has read whole, by path, time of change in nanoseconds, and bytes."""


class TrunkCache:
    """The entries of one backbone and transform in a folder that others may share.

    Args:
        directory: The folder of all entries; made when the first is written.
        context: All that an entry depends on beside the image, as JSON values (see `describe_trunk`).
        dtype: What keys and values are kept as.

    Raises:
        ConfigError: There is no such type.
    """

    def __init__(self, directory: str | Path, context: Mapping[str, Any], *, dtype: CacheType = "bfloat16") -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: got {dtype!r}, expected one of {tuple(DTYPES)}")
        self.directory = Path(directory)
        self.dtype = dtype
        self._context = json.dumps({"format_version": FORMAT_VERSION, "dtype": dtype, **context}, sort_keys=True)
        self.folder = self.directory / hashlib.sha256(self._context.encode()).hexdigest()[:32]

    def path(self, image: str) -> Path:
        """Where the entry of an image is, by the hexadecimal digest of the image."""
        return self.folder / image[:2] / f"{image}.safetensors"

    def encode(self, current: Pass, row: int) -> bytes:
        """One image of a pass that the trunk has filled, as the bytes of an entry."""
        entry = {"query": current.query[row].cpu().contiguous()} if current.query is not None else {}
        if (grid := current.trunk[0].grid) is not None:
            entry["grid"] = torch.tensor(grid, dtype=torch.int32)
        biases = [block.bias for block in current.trunk if block.bias is not None]
        if biases:
            entry["bias"] = torch.stack([bias[min(row, len(bias) - 1)] for bias in biases]).cpu()
        for name, parts in (
            ("keys", [block.key[row] for block in current.trunk]),
            ("values", [block.value[row] for block in current.trunk]),
        ):
            stacked = torch.stack(parts).transpose(1, 2).contiguous()
            if self.dtype == "int8":
                stacked, scale = _quantize(stacked)
                entry[f"{name}_scale"] = scale.cpu()
            entry[name] = stacked.to(DTYPES[self.dtype]).cpu()
        return safetensors.torch.save(entry, {"crc32": _checksum(entry)})

    def write(self, image: str, data: bytes) -> None:
        """Put an entry in its place, all of it at once."""
        path = self.path(image)
        described = self.folder / "context.json"  # for a person who wonders what a folder is of
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(path, data)
            if not described.exists():
                self._write(described, self._context.encode())
        except OSError as error:
            raise ConfigError(
                f"trunk_cache: {self.folder} cannot be written to: {error}; take another folder"
            ) from error

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def is_valid(self, image: str) -> bool:
        """Whether an entry is there and whole; each file is read once by a process."""
        path = self.path(image)
        try:
            status = path.lstat()
        except OSError:
            return False
        known = (str(path), status.st_mtime_ns, status.st_size)
        if known not in _checked:
            if not is_whole(path):
                return False
            _checked.add(known)
        return True

    def size(self) -> int:
        """Bytes of all files in the directory, those of other backbones too."""
        total = 0
        for path in self.directory.rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:  # another process has just moved it
                continue
        return total

    def free(self) -> int:
        """Bytes that the disk of the directory has left."""
        there = next(each for each in (self.directory.absolute(), *self.directory.absolute().parents) if each.exists())
        return shutil.disk_usage(there).free


def is_whole(path: Path) -> bool:
    """Whether a file is an entry with all that was written; it is read."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # which nobody's reading may wait for
            return False
        with safe_open(path, framework="pt") as file:
            entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return (file.metadata() or {}).get("crc32") == _checksum(entry)
    except (OSError, SafetensorError):
        return False


def describe_trunk(backbone: Backbone, transform: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """All that a trunk's tensors depend on beside the image, as JSON values.

    Args:
        backbone: The backbone; every value of its tower counts, so that any change of weights gives other entries.
        transform: What makes the backbone's input of an image, as JSON values.
        precision: The mixed precision that the trunk runs in.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(_bytes(tensor))
    config = {name: value for name, value in backbone.config.to_dict().items() if name not in _NOT_OF_THE_TRUNK}
    return {
        "backbone": backbone.describe() | {"config": json.loads(json.dumps(config, default=str, sort_keys=True))},
        "weights": digest.hexdigest(),
        "attention": backbone.blocks[0]["attention"].config._attn_implementation,
        "transform": dict(transform),
        "precision": precision,
    }


def digest_of(data: bytes | Tensor) -> str:
    """The digest of an image, of its file or its values, as hexadecimal digits."""
    if isinstance(data, Tensor):
        data = f"{data.dtype} {tuple(data.shape)} ".encode() + _bytes(data)
    return hashlib.sha256(data).hexdigest()


def to_pass(batch: Mapping[str, Any]) -> Pass:
    """What `BatchReader.read` gave, as the pass that the trunk would have filled."""
    keys, values = ([each.transpose(1, 2) for each in _dequantized(batch, name)] for name in ("keys", "values"))
    biases = batch.get("bias", [None] * len(keys))
    grid = Grid(*batch["grid"][0].tolist()) if "grid" in batch else None
    blocks = [TrunkBlock(*each, grid) for each in zip(keys, values, biases, strict=True)]
    return Pass(visited=list(range(len(blocks))), trunk=blocks, query=batch.get("query"))


def _quantize(states: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 and a scale, such that their product is nearest to the states."""
    scale = (states.float().abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-20).bfloat16()
    return (states.float() / scale.float()).round().clamp(-127, 127), scale


def _dequantized(batch: Mapping[str, Any], name: str) -> list[Tensor]:
    if f"{name}_scale" not in batch:
        return batch[name]
    return [states.to(scale.dtype) * scale for states, scale in zip(batch[name], batch[f"{name}_scale"], strict=True)]


def _bytes(tensor: Tensor) -> bytes:
    parts = [part.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for part in stored_parts(tensor)]
    return b"".join(part.numpy().tobytes() for part in parts)


def _checksum(entry: Entry) -> str:
    checksum = 0
    for name, tensor in sorted(entry.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(), checksum)
        checksum = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"

"""A tensor described, its values drawn, the file written."""

from __future__ import annotations

import math
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

Kind = Literal["f32", "f16", "q8_0"]
MetadataValue = bool | int | float | str | list[str] | list[int] | list[float]
Metadata = dict[str, MetadataValue]

Q8_0 = np.dtype([("scale", "<f2"), ("steps", "i1", 32)])
_GGML_TYPE = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
# What one weight takes in the file, in bytes.
_WIDTH = {"f32": 4.0, "f16": 2.0, "q8_0": Q8_0.itemsize / 32}
_STEP_STD = math.sqrt((255**2 - 1) / 12)  # of integers spread evenly over -127..127


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of values spread evenly around `mean`. `shape` is numpy's, rows first; ggml prints it reversed.

    Rows from `n_used` on are all `mean`; None uses them all.
    """

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    kind: Kind = "f32"
    n_used: int | None = None

    def __post_init__(self) -> None:
        if self.kind == "q8_0" and (self.mean or self.shape[-1] % 32):
            raise ValueError(f"{self.name}: q8_0 needs mean 0 and rows of a multiple of 32, not {self.shape}")

    @property
    def n_bytes(self) -> int:
        return round(math.prod(self.shape) * _WIDTH[self.kind])

    def draw(self, seed: int) -> np.ndarray:
        """The values, ready for the file: `shape` in f32 or f16, or (n_blocks,) of `Q8_0`.

        Every kind is made from the same random steps -127..127 times one scale, so that nothing has to be quantised
        and `kind` changes the precision but not the model. They depend on seed and name, not on the other tensors.
        """
        random = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        # Raw bytes rather than `integers`: numpy promises their stream. ggml's own q8_0 never holds -128.
        steps = np.maximum(np.frombuffer(random.bytes(math.prod(self.shape)), np.int8), -127).reshape(self.shape)
        if self.n_used is not None:
            steps[self.n_used :] = 0
        scale = self.std / _STEP_STD
        if self.kind == "q8_0":
            blocks = np.empty(steps.size // 32, Q8_0)
            blocks["scale"] = scale
            blocks["steps"] = steps.reshape(-1, 32)
            return blocks
        values = steps.astype(np.float32) * np.float32(scale) + np.float32(self.mean)
        return np.asarray(values, "<f2" if self.kind == "f16" else "<f4")


def matrix(
    name: str, n_out: int, n_in: int, *, gain: float = 1.0, kind: Kind = "f32", n_used: int | None = None
) -> Weight:
    """A projection (n_out, n_in) that multiplies the RMS of what passes through it by about `gain`."""
    return Weight(f"{name}.weight", (n_out, n_in), gain / math.sqrt(n_in), kind=kind, n_used=n_used)


def norm(name: str, n: int) -> Weight:
    """A norm's weights (n,): about 1, each different, so that a forgotten one shows."""
    return Weight(f"{name}.weight", (n,), 0.1, mean=1.0)


def bias(name: str, n: int, *, std: float = 0.1, mean: float = 0.0) -> Weight:
    return Weight(f"{name}.bias", (n,), std, mean=mean)


def write_gguf(
    path: Path, arch: str, *, hparams: Metadata, tokenizer: Metadata, weights: Sequence[Weight], seed: int
) -> None:
    """Write the file, one tensor in memory at a time; `path` appears whole or not at all.

    `hparams` come without the architecture's name before them; `tokenizer` keys stand as they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    metadata = {f"{arch}.{key}": value for key, value in hparams.items()} | tokenizer
    try:
        _write(temporary, arch, metadata, weights, seed)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, arch: str, metadata: Metadata, weights: Sequence[Weight], seed: int) -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("random")
    for key, value in metadata.items():
        _add(writer, key, value)
    for weight in weights:
        kind = _GGML_TYPE[weight.kind]
        writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.float32), weight.n_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight in weights:
            writer.write_tensor_data(weight.draw(seed))
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: MetadataValue) -> None:
    # bool before int, which it is too: llama.cpp refuses a key of another type than it asks for.
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)

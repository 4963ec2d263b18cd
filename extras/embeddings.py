"""Embeddings of any system in an .npz file, for the benchmarks of eval.py.

    python eval.py --task coco --folder DIR --embeddings clip.npz
    python eval.py --task coco --folder DIR --save-embeddings mine.npz

Not here: an index of many images, to be asked in words (search.py).
"""

import io
import tokenize
import typing
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import write_whole
from eval import Benchmark

# what numpy and zipfile raise on files that are broken, or none of theirs
NPZ_ERRORS = (OSError, ValueError, TypeError, LookupError, EOFError, RuntimeError, MemoryError)
NPZ_ERRORS += (SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


def load(path: str, benchmark: Benchmark) -> tuple[Tensor, Tensor]:
    """(image_emb, text_emb) from an .npz file of any system, in the benchmark's order; normalised.

    Where the file holds "images" (file names) or "texts" too, they must be the benchmark's.
    """
    try:
        if not Path(path).is_file():  # nor is a pipe, on which reading would wait
            raise ValueError("no such file")
        with np.load(path) as file:
            image_emb = read_rows(file, "image", [Path(image).name for image in benchmark.images])
            text_emb = read_rows(file, "text", benchmark.texts)
        if image_emb.shape[1] != text_emb.shape[1]:
            shapes = f"image_emb is {tuple(image_emb.shape)}, text_emb {tuple(text_emb.shape)}"
            raise ValueError(f"{shapes}, wanted one width")
    except NPZ_ERRORS as error:
        raise ValueError(f"{path} cannot be used as embeddings ({error})") from None
    return image_emb, text_emb


# (B, D) of kind "image" or "text", one row for each of the names.
def read_rows(file: typing.Any, kind: str, names: list[str]) -> Tensor:
    limit = 1024 + len(names) * 2**17  # bytes: a row of 16,384 numbers in float64
    members = [f"{kind}_emb", *({f"{kind}s"} & set(file.files))]
    # before anything is unpacked
    for name in members:
        if file.zip.getinfo(f"{name}.npy").file_size > limit:
            raise ValueError(f"{name} has over {limit:,} bytes for {len(names)} rows")
    emb, *stored_names = [np.asarray(file[name]) for name in members]
    wanted = f"({len(names)}, D) finite numbers, not all 0 in a row"
    problem = f"{kind}_emb is {emb.dtype} {emb.shape}, wanted {wanted}"
    if emb.ndim != 2 or len(emb) != len(names) or not emb.size or emb.dtype.kind not in "fiu":
        raise ValueError(problem)
    # in float64, and first scaled to a largest value of 1: squares of large numbers overflow
    emb = emb.astype(np.float64)
    largest = np.abs(emb).max(axis=1, keepdims=True)
    if not ((largest > 0) & (largest < np.inf)).all():
        raise ValueError(problem)
    if stored_names and stored_names[0].tolist() != names:
        raise ValueError(f"its {kind}s are not the benchmark's, or in another order")
    return F.normalize(torch.from_numpy(emb / largest), dim=-1).float()


def save(path: str, benchmark: Benchmark, image_emb: Tensor, text_emb: Tensor) -> None:
    """Write what load reads."""
    names = {"images": [Path(image).name for image in benchmark.images], "texts": benchmark.texts}
    content = io.BytesIO()
    np.savez(content, image_emb=image_emb.numpy(), text_emb=text_emb.numpy(), **names)
    write_whole(path, lambda partial: partial.write_bytes(content.getbuffer()))

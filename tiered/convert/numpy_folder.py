"""The folders that FlexGen and Alpa read OPT from: one file in numpy's format for each tensor, named after it.

In: a folder's files, such as `decoder.layers.0.fc1.weight`. Out: its tensors by those names, which are metaseq's, and
where they lie; `opt.py` puts them together. The heads' queries, keys and values are apart.
"""

import re
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
import torch

from tiered.convert.gather import Extent, Region
from tiered.convert.place import WeightFiles
from tiered.errors import CheckpointError, shortened
from tiered.files import reading

EMBEDDING: Final = "decoder.embed_tokens.weight"
_TENSOR: Final = re.compile(r"(decoder\..+|lm_head)\.(weight|bias)")
_DTYPES: Final = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}


def read_numpy(files: WeightFiles) -> dict[str, Region]:
    """The tensors among `files`; raises CheckpointError where one is not whole."""
    return {name: _region(files.path(name)) for name in sorted(files.names) if _TENSOR.fullmatch(name)}


def _region(path: Path) -> Region:
    with reading(path), path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_transposed, dtype = read(file)
        except OSError:
            raise
        except Exception as error:
            # A header is a Python literal, which is parsed in several ways; what is wrong with one may raise anything.
            raise CheckpointError(
                f"{path}: not in numpy's format ({shortened(error)}); download or make the file again"
            ) from None
        offset, nbytes = file.tell(), path.stat().st_size
    if is_transposed or dtype.str not in _DTYPES:
        raise CheckpointError(
            f"{path}: holds {dtype}{' in columns' if is_transposed else ''}, expected rows of float16; make it again "
            "with np.save"
        )
    region = Region(_DTYPES[dtype.str], shape, (Extent(path, offset, prod(shape) * dtype.itemsize),))
    if offset + region.nbytes != nbytes:
        raise CheckpointError(
            f"{path}: has {nbytes:,} bytes, expected {offset + region.nbytes:,} for {list(shape)} of {dtype}; download "
            "or make the file again"
        )
    return region

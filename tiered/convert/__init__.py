"""From a checkpoint, or an old store, to a store: `convert_checkpoint` is what `tiered convert` calls."""

import os
from dataclasses import replace
from pathlib import Path

from tiered.convert.convert import Conversion, ConvertProgress, ConvertResult, ProgressFunction
from tiered.convert.folder import is_store
from tiered.convert.open import open_checkpoint, open_shape, resolve_checkpoint, resolve_folder, resolve_shape
from tiered.convert.recipe import ConvertOptions
from tiered.convert.tokenizer import GivenTokenizer
from tiered.convert.upgrade import upgrade_store
from tiered.errors import ConfigError

__all__ = ["ConvertOptions", "ConvertProgress", "ConvertResult", "ProgressFunction", "convert_checkpoint"]


def convert_checkpoint(
    source: str | Path,
    output: Path | None = None,
    options: ConvertOptions | None = None,
    progress: ProgressFunction | None = None,
) -> ConvertResult:
    """Convert `source` into the store `output` (default: NAME.tiered in the current folder).

    `source` is a local folder, a GGUF file, a hub id or a known name. With `options.synthetic` or `options.weights` it
    is a known shape, or a toml file of one. Raises ConfigError for bad usage, UnsupportedFamilyError, CheckpointError
    for a damaged or foreign checkpoint, BudgetError, DiskFullError and ReadError. Whatever ends it, finished blocks are
    kept and the same call resumes. A `source` that is a store of format version 1 is upgraded where it is; one of any
    version gets the tokenizer of `options`.
    """
    options = options or ConvertOptions()
    given = None if options.tokenizer is None else GivenTokenizer.read(options.tokenizer)
    folder = Path(source).expanduser()
    # Not Path's: a name may be longer than any path.
    if not options.synthetic and options.weights is None and os.path.isdir(folder) and is_store(folder):  # noqa: PTH112
        if output is not None:
            raise ConfigError(f"{folder}: a store, which is upgraded where it is; drop -o")
        if given is not None:
            given.check_store(folder)
        result = upgrade_store(folder, replace(options, tokenizer=None), progress)
        if given is None:
            return result
        given.put_into(folder)
        return replace(result, tokenizer=given.path, has_tokenizer=True)
    if options.synthetic:
        shape = resolve_shape(source)
        conversion = Conversion(output or Path(f"{shape.name}.tiered"), options, progress, given)
        return conversion.run(lambda: open_shape(shape, options, given))
    named = None if options.weights is None else resolve_shape(source)
    place = resolve_checkpoint(source) if options.weights is None else resolve_folder(options.weights)
    conversion = Conversion(output or Path(f"{(named or place).name}.tiered"), options, progress, given)
    return conversion.run(lambda: open_checkpoint(place, options, conversion, given, named))

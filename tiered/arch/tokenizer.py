"""Loads a folder's tokenizer as transformers does; whatever that or the tokenizer raises becomes one error."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tiered.errors import TieredError, shortened


def read_tokenizer(folder: Path, name: str, error: type[TieredError], remedy: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, tried out; raises `error`, which says `name` and `remedy`, where it cannot be used."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        # Some damage shows only when a tokenizer is used.
        _ = str(tokenizer.decode(tokenizer("Once")["input_ids"])), len(tokenizer), tokenizer.eos_token_id
    except BaseException as reason:
        # A tokenizer's own code may raise anything on a damaged file. A panic of a native one is no Exception, and its
        # class cannot be imported: only its name tells.
        if not isinstance(reason, Exception) and type(reason).__name__ != "PanicException":
            raise
        raise error(f"{name}: its tokenizer cannot be used ({shortened(reason)}); {remedy}") from reason
    return tokenizer

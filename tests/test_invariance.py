"""With the native kernels a sequence's logits are the same bits alone, in any batch, and at any number of threads."""

from pathlib import Path

import pytest
import torch

import tiered
from tests.quick import represented
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.kernels import load_library

CHECKPOINT = Path(__file__).parent / "data/models/opt-docs-8m"
PROMPTS = (
    "To install the package",
    "The",
    "This option sets the default value of the directory in which all files of the program are kept, unless",
)
TOKENS = 12


@pytest.fixture(scope="module", params=represented(["int4", "none"], ["int4"]))
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = load_library()
    if isinstance(library, str):
        pytest.skip(library)
    path = tmp_path_factory.mktemp("invariance") / f"{request.param}.tiered"
    convert_checkpoint(CHECKPOINT, path, ConvertOptions(quant=request.param))
    return path


def test_a_sequence_does_not_depend_on_its_batch_or_the_number_of_threads(store: Path) -> None:
    together = generate(store, PROMPTS, threads=2)
    for prompt, (ids, scores) in zip(PROMPTS, together, strict=True):
        ((alone_ids, alone_scores),) = generate(store, (prompt,), threads=1)
        assert ids.tolist() == alone_ids.tolist()
        assert torch.equal(scores, alone_scores)


def generate(store: Path, prompts: tuple[str, ...], threads: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Greedy completions of `prompts` in one batch, and the scores [TOKENS, vocab] they were taken from."""
    with tiered.load(store, dtype="bfloat16", context=64, sequences=len(prompts), threads=threads) as loaded:
        assert loaded.runtime.host.kernels.level is not None
        loaded.tokenizer.padding_side = "left"
        loaded.tokenizer.pad_token = loaded.tokenizer.pad_token or loaded.tokenizer.eos_token
        inputs = loaded.tokenizer(list(prompts), return_tensors="pt", padding=True)
        found = loaded.model.generate(
            **inputs,
            min_new_tokens=TOKENS,
            max_new_tokens=TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        scores = torch.stack(found.logits, dim=1)  # [prompts, TOKENS, vocab]
        return [(found.sequences[i, -TOKENS:], scores[i]) for i in range(len(prompts))]

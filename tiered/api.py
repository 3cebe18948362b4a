"""The Python API: a store as a Hugging Face model whose weights stay on disk.

    import tiered

    with tiered.load("opt-6.7b.tiered", ram="4GiB") as loaded:
        inputs = loaded.tokenizer("The", return_tensors="pt")
        print(loaded.tokenizer.decode(loaded.model.generate(**inputs, max_new_tokens=20)[0]))

The model is a `PreTrainedModel` with `GenerationMixin`, so decoding strategies, streamers, stopping criteria, logits
processors and caches are transformers' own. Its forward is one pass over the store.
"""

from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tiered.arch import context_for, load_config
from tiered.errors import ConfigError
from tiered.generate.tokenizer import load_generation_config, load_tokenizer
from tiered.io import VerifyPolicy
from tiered.kernels import Mode
from tiered.offloaded import OffloadedModel
from tiered.options import PhaseDevice
from tiered.plan import Tier, Workload, parse_tiers
from tiered.runtime import Options, Runtime, compute_dtype
from tiered.store import Store
from tiered.units import parse_option

LEAST_CONTEXT: Final = 128
"""Tokens of the shortest default context: a budget that is too small for it is refused."""


def load(
    store: str | Path,
    ram: str | int | None = None,
    tiers: str = "disk,cpu",
    *,
    dtype: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    sequences: int = 1,
    verify: str = "first",
    kernels: str = "auto",
    kernel_mode: str = "invariant",
    vram: str | int | None = None,
    device: str = "auto",
    resident_gpu: str | int | None = None,
    resident_cpu: str | int | None = None,
    prefill_device: PhaseDevice = "auto",
    decode_device: PhaseDevice = "auto",
    fallback: Literal["cpu"] | None = None,
) -> "LoadedModel":
    """Open `store` as a model that runs within `ram` ("4GiB" or bytes; default 90 % of what is free).

    `context` is the longest sequence in tokens, prompt and completion together, and `sequences` how many run at
    once, beams included: memory for their KV cache is set aside. The default is one sequence of up to 2048 tokens whose
    cache takes at most an eighth of the budget; where that leaves too little for the rest, a shorter one, of at least
    128 tokens.

    With a GPU among the tiers ("disk,cpu,gpu", "cpu,gpu", "gpu") `device` computes: "cuda", "cuda:1", "emulated", or
    "auto", the first CUDA device. `vram` bounds its memory (default 90 % of what is free there); `resident_gpu` and
    `resident_cpu` ("4GiB" or bytes, 0 for none) are the weights that stay on it and in memory. `decode_device="cpu"`
    leaves to the device only prompts that begin a cache, of transformers' growing kinds, in forwards of several tokens;
    the cache and all else are the processor's. "auto" is the GPU. `fallback="cpu"` lets the processor compute where the
    device cannot be used, which is an error otherwise.

    Raises StoreError, ConfigError, or, when the context is entered, BudgetError.
    """
    opened = Store.open(store)
    try:
        policy = VerifyPolicy(verify)
    except ValueError:
        raise ConfigError(f"verify {verify!r}: expected first, always or never") from None
    try:
        mode = Mode(kernel_mode)
    except ValueError:
        raise ConfigError(f"kernel_mode {kernel_mode!r}: expected invariant or fast") from None
    parsed = parse_tiers(tiers)
    options = Options(
        ram=_bytes("ram", ram),
        tiers=parsed,
        dtype=dtype,
        threads=threads,
        verify=policy,
        kernels=kernels,
        kernel_mode=mode,
        device=None if device == "auto" else device,
        vram=_bytes("vram", vram),
        resident_gpu=_bytes("resident_gpu", resident_gpu, or_none=True),
        resident_cpu=_bytes("resident_cpu", resident_cpu, or_none=True),
        prefill_device=prefill_device,
        decode_device=decode_device,
        fallback=fallback,
        # transformers' own caches grow where the model decodes.
        kv="gpu" if Tier.GPU in parsed and decode_device != "cpu" else "cpu",
    )
    config = load_config(opened.path)
    compute_dtype(dtype, config, options.has_device)  # raises ConfigError for an unknown dtype
    tokens, least = context_for(config, context, "context"), LEAST_CONTEXT if context is None else 0
    workload = Workload(sequences, tokens, least_context=least)
    return LoadedModel(opened, config, workload, options)


def _bytes(name: str, value: str | int | None, or_none: bool = False) -> int | None:
    return parse_option(name, value, or_none) if isinstance(value, str) else value


class LoadedModel:
    """A context manager that gives `model` and `tokenizer`; threads and memory are released when it ends."""

    def __init__(self, store: Store, config: PretrainedConfig, workload: Workload, options: Options) -> None:
        self._store, self._config = store, config
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.runtime = Runtime(store, workload, options, has_pool=False)
        self._model: OffloadedModel | None = None

    def __enter__(self) -> Self:
        # Loaded before the runtime measures what the process itself takes.
        _ = self.tokenizer
        generation_config = load_generation_config(self._store)
        model = OffloadedModel(self._config, self.runtime, generation_config)
        self.runtime.__enter__()
        try:
            self._model = model
            return self
        except BaseException:  # an interrupt
            self.__exit__(None, None, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._model = None
        self.runtime.__exit__(kind, error, tb)

    @property
    def model(self) -> OffloadedModel:
        """The model; usable inside the context only."""
        if self._model is None:
            raise ConfigError("the model is not open: use it inside 'with tiered.load(...) as loaded:'")
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The store's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._store)
        return self._tokenizer

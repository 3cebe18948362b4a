"""The options of a run: everything that can be chosen, with defaults."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import torch
from transformers import PretrainedConfig

from tiered.errors import ConfigError
from tiered.io import ReadMode, VerifyPolicy
from tiered.kernels import Mode
from tiered.plan import AnyBits, Computes, KVTier, Tier
from tiered.plan.inputs import check_decodes_on_processor, tiers_text
from tiered.plan.phases import PHASES, Phases

PhaseDevice = Literal["auto", "cpu", "gpu"]
"""What is to compute a phase; auto: what is quickest where a profile tells, else the GPU, if a tier."""
_DEVICE: Final = re.compile(r"auto|cuda(:\d{1,3})?|emulated")


@dataclass(frozen=True)
class Options:
    """How to run; every field has a sensible default."""

    ram: int | None = None
    """Budget in bytes for the whole process; None: 90 % of what there is."""
    tiers: tuple[Tier, ...] = (Tier.DISK, Tier.CPU)
    dtype: str = "auto"
    """Compute dtype; see `compute_dtype`."""
    threads: int | None = None
    """Threads that compute; None: as many as processors that may be used."""
    verify: VerifyPolicy = VerifyPolicy.FIRST
    prefetch: int | None = None
    """Units that may be read before they are asked for; None: as many as the ring holds."""
    micro_batch_rows: int | None = None
    """Tokens that are computed together at most; None: as many as memory allows and are useful."""
    kv: KVTier = "cpu"
    """Where the KV cache is; auto: where a run is expected to be quicker, or, where no rates are known, on the
    device if it fits there and gains, else in memory if it fits there; host: the same, but not on the device."""
    kv_bits: AnyBits = 16
    kv_folder: Path | None = None
    """The folder for the KV cache's file, if it is on disk; None: the store's."""
    kernels: str = "auto"
    """A name of `tiered.kernels.KERNEL_NAMES`."""
    kernel_mode: Mode = Mode.INVARIANT
    keep_spans: bool = False
    """Keep the spans of the trace, not only their totals."""
    read_mode: ReadMode | None = None
    """How files are read; None: found out by a small read."""
    device: str | None = None
    """What computes, with a GPU among the tiers: "auto" (None) or "cuda" is the first CUDA device, "cuda:1" the second,
    "emulated" one that this process plays."""
    vram: int | None = None
    """Budget in bytes for the device's memory; None: 90 % of what is free there when it is opened."""
    resident_gpu: int | None = None
    """Bytes of weights that are to stay on the device; None: as many as there is room for."""
    resident_cpu: int | None = None
    """Bytes of weights that are to stay in memory, beside those on a device; None: as many as there is room for,
    or fewer where a short job is quicker so."""
    prefill_device: PhaseDevice = "auto"
    """What computes prompts."""
    decode_device: PhaseDevice = "auto"
    """What computes the rest."""
    fallback: Literal["cpu"] | None = None
    """"cpu": where the device cannot be used, the processor computes, and the report says so; None: that is an
    error. A budget of its memory that is too small is one all the same."""

    def __post_init__(self) -> None:
        for name, value in (("ram", self.ram), ("threads", self.threads), ("micro-batch", self.micro_batch_rows)):
            if value is not None and not _is_count(value, 1):
                raise ConfigError(f"{name} {value!r}: expected a whole number above 0")
        if self.kv not in ("auto", "cpu", "disk", "gpu", "host"):
            raise ConfigError(f"kv {self.kv!r}: expected auto, gpu, cpu or disk")
        if self.vram is not None and not _is_count(self.vram, 1):
            raise ConfigError(f"vram {self.vram!r}: expected a number of bytes above 0")
        for name, wish in (("resident-gpu", self.resident_gpu), ("resident-cpu", self.resident_cpu)):
            if wish is not None and not _is_count(wish, 0):
                raise ConfigError(f"{name} {wish!r}: expected a number of bytes")
        if self.fallback not in (None, "cpu"):
            raise ConfigError(f"fallback {self.fallback!r}: expected cpu, or none")
        if self.device is not None and not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device {self.device!r}: expected auto, cuda, cuda:1 and so on, or emulated")
        for name, phase in (("prefill-device", self.prefill_device), ("decode-device", self.decode_device)):
            if phase not in ("auto", "cpu", "gpu"):
                raise ConfigError(f"{name} {phase!r}: expected auto, cpu or gpu")
        if self.has_device:
            self._check_device()
        elif (given := self._of_device()) is not None:
            raise ConfigError(
                f"--{given} is for a GPU, and --tiers {tiers_text(self.tiers)} has none; add --tiers disk,cpu,gpu"
            )
        if self.resident_cpu is not None and Tier.DISK not in self.tiers:
            raise ConfigError(
                f"--resident-cpu: --tiers {tiers_text(self.tiers)} reads nothing again, so all weights stay; add disk "
                "to --tiers"
            )

    @property
    def has_device(self) -> bool:
        """Whether a device is to compute."""
        return Tier.GPU in self.tiers

    @property
    def computes(self) -> Phases:
        """What computes prompts, and what computes the rest; auto is the GPU here, if a tier."""
        default: Computes = "gpu" if self.has_device else "cpu"
        prefill = default if self.prefill_device == "auto" else self.prefill_device
        return prefill, default if self.decode_device == "auto" else self.decode_device

    @property
    def phase_choices(self) -> tuple[Phases, ...]:
        """The phases that "auto" may stand for, where what each takes is known; one or none: nothing is to choose."""
        if not self.has_device or "auto" not in (self.prefill_device, self.decode_device):
            return ()
        return tuple(phases for phases in PHASES if self._allows(phases))

    def _allows(self, phases: Phases) -> bool:
        given = self.prefill_device, self.decode_device
        if any(asked not in ("auto", each) for asked, each in zip(given, phases, strict=True)):
            return False
        if phases == ("cpu", "cpu"):
            # Wishes for the device are wishes to use it.
            wishes = self.kv == "gpu", self.resident_gpu is not None
            return Tier.CPU in self.tiers and self.dtype != "float16" and not any(wishes)
        try:
            self.with_phases(phases)
        except ConfigError:
            return False
        return True

    def with_phases(self, phases: Phases) -> "Options":
        """The options with which these compute, without the device if that has nothing to do."""
        if "gpu" not in phases:
            return self.without_device() if self.has_device else self
        return replace(self, prefill_device=phases[0], decode_device=phases[1])

    @property
    def device_name(self) -> str | None:
        """The device that is to compute, "cuda" or "cuda:1" or "emulated"; None: the processor computes."""
        if not self.has_device:
            return None
        return "cuda" if self.device in (None, "auto") else self.device

    def for_prompts(self) -> "Options":
        """The options where nothing decodes: what computes prompts computes all."""
        return replace(self, decode_device=self.prefill_device) if self.has_device else self

    def without_device(self) -> "Options":
        """The options with which the processor does the same, where a device cannot be used: `fallback`."""
        tiers = tuple(tier for tier in self.tiers if tier is not Tier.GPU)
        return replace(
            self,
            tiers=(Tier.DISK, Tier.CPU) if Tier.CPU not in tiers else tiers,
            kv="auto" if self.kv == "gpu" else self.kv,
            dtype="auto" if self.dtype == "float16" else self.dtype,
            device=None,
            vram=None,
            resident_gpu=None,
            prefill_device="auto",
            decode_device="auto",
            fallback=None,
        )

    def _of_device(self) -> str | None:
        """The name of an option that was given and means nothing without a device."""
        given = {
            "device": self.device not in (None, "auto"),
            "vram": self.vram is not None,
            "resident-gpu": self.resident_gpu is not None,
            "prefill-device gpu": self.prefill_device == "gpu",
            "decode-device gpu": self.decode_device == "gpu",
            "kv gpu": self.kv == "gpu",
            "fallback": self.fallback is not None,
        }
        return next((name for name, is_given in given.items() if is_given), None)

    def _check_device(self) -> None:
        """Raise ConfigError for options of a device that contradict each other."""
        tiers, computes = tiers_text(self.tiers), self.computes
        if computes == ("cpu", "cpu"):
            raise ConfigError(
                f"--prefill-device cpu --decode-device cpu: nothing is left for the GPU of --tiers {tiers}; use "
                "--tiers disk,cpu"
            )
        if computes == ("cpu", "gpu"):
            raise ConfigError(
                "--prefill-device cpu --decode-device gpu: prompts are what a GPU is quickest at; use --prefill-device "
                "gpu, with --decode-device cpu for the other way round"
            )
        if self.device == "emulated" and self.vram is None:
            raise ConfigError("--device emulated: it has no memory of its own; say how much with --vram, such as 1GiB")
        is_hybrid = computes == ("gpu", "cpu")
        if is_hybrid:
            check_decodes_on_processor(self.tiers)
        if is_hybrid and self.kv == "gpu":
            raise ConfigError(
                "--kv gpu --decode-device cpu: the cache is where decoding is; use --kv auto, cpu or disk"
            )
        if is_hybrid and self.dtype == "float16":
            raise ConfigError("--dtype float16 --decode-device cpu: the processor has no arithmetic for it; use auto")
        if self.resident_gpu and is_hybrid:
            raise ConfigError(
                "--resident-gpu --decode-device cpu: where it computes prompts only, all weights pass through; drop one"
            )
        if self.resident_gpu is not None and Tier.CPU not in self.tiers:
            raise ConfigError(f"--resident-gpu: --tiers {tiers} keeps all weights on the GPU; use --tiers disk,cpu,gpu")


def _is_count(value: object, least: int) -> bool:
    """Whether a value is a whole number of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def compute_dtype(name: str, config: PretrainedConfig, on_device: bool = False) -> torch.dtype:
    """The dtype activations are computed in: "auto" is float32 for a float32 checkpoint, else bfloat16, for which a
    device may take float16 (`kernels.device_dtype`). Raises ConfigError for an unknown name, and for float16 where no
    device computes (`on_device`)."""
    if name == "auto":
        return torch.float32 if config.dtype in (None, torch.float32) else torch.bfloat16
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if on_device:
        known["float16"] = torch.float16
    if name not in known:
        raise ConfigError(f"dtype {name!r}: expected auto, {', '.join(list(known)[:-1])} or {list(known)[-1]}")
    return known[name]

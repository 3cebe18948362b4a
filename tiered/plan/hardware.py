"""A machine in numbers: what a profile has measured, or what a file of configs/hardware says of somebody else's.

In: TOML. Out: frozen rates, from which plans, predictions and simulations are made. All bandwidths are in bytes per
second, sizes in bytes. Nothing here touches a machine: `bench/profile.py` measures one.
"""

import bisect
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from tiered.errors import ConfigError
from tiered.plan.inputs import ComputeRate, Machine, QuantizedRates
from tiered.plan.kv import BITS_BY_NAME, KVShape

Mode = Literal["invariant", "fast"]
FORMAT: Final = 2
"""Of files; another one has other tables, or means other things by them."""
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Rows for which a described machine's kernels get a figure."""
SCHEMES: Final = ("int4-g64", "int8-g64", "none")
"""Of which described machines have figures; "none": 16 bits."""
_SCHEME: Final = re.compile(r"(int4|int8|mxfp4|nf4|iq4nl)-g([1-9]\d*)")
_SCALES_NBYTES: Final = {"mxfp4": 1, "nf4": 4, "iq4nl": 2}
"""Of a group, in codes that are looked up; integers have a scale of 16 bits and a zero of 8."""


@dataclass(frozen=True)
class DiskRates:
    """A disk, through the file system, past the page cache."""

    read: float
    """Sustained, in file order."""
    write: float
    random: tuple[tuple[int, float], ...] = ()
    """Pairs (bytes of a read, bandwidth) of reads at random places, in ascending order; none: as in file order."""
    streamed: float | None = None
    """The share of `read` that passes over a model reach while hardly anything computes; None: all of it."""
    kept: float | None = None
    """Bandwidth of a first pass for what then stays in memory, which it tests and takes memory for; None: as any."""

    def random_read(self, nbytes: int) -> float:
        """Bandwidth of reads of `nbytes` at random places; between measured sizes it is interpolated."""
        if not self.random:
            return self.read
        sizes = [size for size, _ in self.random]
        at = bisect.bisect_left(sizes, nbytes)
        if at == 0 or at == len(sizes):
            return self.random[min(at, len(sizes) - 1)][1]
        (low, slow), (high, fast) = self.random[at - 1], self.random[at]
        return slow + (fast - slow) * (nbytes - low) / (high - low)


@dataclass(frozen=True)
class LinearRate:
    """Linear layers of one scheme in one kernel mode."""

    scheme: str
    """"int4-g64", "int8-g64", or "none" for 16 bits."""
    mode: Mode
    rate: ComputeRate


@dataclass(frozen=True)
class AttendedRate:
    """Attention of tokens that are decoded, over a KV cache of so many bits."""

    bits: int
    rate: ComputeRate
    """Seconds per byte of keys and values, counted as in 16 bits, by how many queries share a key."""


@dataclass(frozen=True)
class CpuRates:
    """What the processor does with all of its threads."""

    cores: int
    memory: float
    """Bandwidth of reading memory."""
    attention: float
    """Bytes of keys and values per second that decoding attends over, in memory, in 16 bits."""
    prefill_attention: float
    """Multiply-adds times two per second of a prompt's attention."""
    linear: tuple[LinearRate, ...]
    operation_seconds: float | None = None
    """What an operation beside linear layers and attention takes, however few the rows are (`ModelShape.operations`);
    None: nothing is known of it."""
    element_seconds: float | None = None
    """What each number that these operations write takes."""
    reading_seconds: float | None = None
    """By how much computing takes longer for each byte that is read meanwhile."""
    touch: float | None = None
    """Bandwidth of touching memory for the first time, by one thread; None: nothing is known of it."""
    quantize: float | None = None
    """Bytes of new keys and values per second, counted as in 16 bits, of which 8 or 4 bits are made, a page of many
    heads at a time; None: nothing is known of it."""
    attended: tuple[AttendedRate, ...] = ()
    """As `attention`, by bits and by queries that share a key; 16 bits that are not there are attended over as that
    says, and others as 16."""

    def attention_seconds(self, kv: KVShape, queries: int, bits: int) -> float | None:
        """Seconds per token of context, for one query of one sequence in one layer that keeps `kv` in so many bits and
        whose keys `queries` queries share; None where nothing is known of these bits."""
        found = next((each for each in self.attended if each.bits == bits), None)
        if found is not None:
            # Latents are kept once, and multiplied as keys and as values.
            times = sum(kv.widths) / (kv.head_dim + kv.value_dim)
            return found.rate.seconds(round(queries * times), kv.token_nbytes if bits == 16 else _in_16_bits(kv))
        return kv.token_nbytes / self.attention if bits == 16 else None

    def quantized(self, kv: KVShape, queries: int) -> Iterator[QuantizedRates]:
        """What a KV cache of 8 and of 4 bits takes, where it is known."""
        store = 0.0 if self.quantize is None else _in_16_bits(kv) / self.quantize
        for bits in (8, 4):
            if (seconds := self.attention_seconds(kv, queries, bits)) is not None:
                yield QuantizedRates(bits, seconds, store)

    def linear_rate(self, scheme: str | None, mode: Mode) -> ComputeRate:
        """The rate of a scheme, or of one with as many bits and other groups, in proportion to the bytes of a weight;
        codes that are looked up count as int4. Raises ConfigError where there is none."""
        name = scheme or "none"
        alike = [found for found in self.linear if found.mode == mode and _kind(found.scheme) == _kind(name)]
        for found in sorted(alike, key=lambda found: found.scheme != name):
            share = bytes_per_weight(name) / bytes_per_weight(found.scheme)
            return ComputeRate(found.rate.rows, tuple(share * seconds for seconds in found.rate.seconds_per_weight))
        known = ", ".join(f"{found.scheme} {found.mode}" for found in self.linear)
        raise ConfigError(f"no speed of linear layers in {name}, {mode} mode; there are {known}: run 'tiered profile'")


def _in_16_bits(kv: KVShape) -> int:
    """Bytes of a token's keys and values, whatever the compute dtype."""
    return kv.token_nbytes * 2 // kv.itemsize


def _kind(scheme: str) -> str:
    """The schemes that are computed alike, but for the bytes of a weight."""
    bits = scheme.partition("-")[0]
    return "int4" if bits in _SCALES_NBYTES else bits


@dataclass(frozen=True)
class GpuRates:
    """A graphics processor and the bus to it."""

    name: str
    vram: int
    host_to_device: float
    """From pinned memory."""
    device_to_host: float
    memory: float
    flops: float
    """Of dense 16-bit matrix products, as sustained."""


@dataclass(frozen=True)
class Hardware:
    """One machine."""

    name: str
    source: str
    """Where the figures are from, for people: "measured ..." or a publication."""
    is_measured: bool
    ram: int
    disk: DiskRates
    cpu: CpuRates
    gpu: GpuRates | None = None
    usd_per_hour: float | None = None

    def machine(
        self, scheme: str | None, mode: Mode, kv: KVShape | None, scratch_nbytes: int, queries: int = 1
    ) -> Machine:
        """The machine as a plan wants it, for a model whose layers are in `scheme` and keep keys and values of `kv`,
        each key for `queries` queries."""
        cpu, disk = self.cpu, self.disk
        attention = None if kv is None else cpu.attention_seconds(kv, queries, 16)
        return Machine(
            scratch_nbytes=scratch_nbytes,
            disk_bytes_per_second=disk.read * (disk.streamed or 1.0),
            linear=cpu.linear_rate(scheme, mode),
            attention_seconds=attention or 0.0,
            quantized=() if kv is None else tuple(cpu.quantized(kv, queries)),
            operation_seconds=cpu.operation_seconds or 0.0,
            element_seconds=cpu.element_seconds or 0.0,
            reading_seconds=cpu.reading_seconds or 0.0,
            kept_bytes_per_second=disk.kept,
            touch_bytes_per_second=cpu.touch,
        )

    @classmethod
    def from_toml(cls, text: str, name: str) -> Self:
        """The machine that `text` describes; `name` is what errors call it.

        Raises ConfigError for what is no TOML, unknown, missing or not above 0.
        """
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{name}: is no TOML file: {error}") from None
        found = _Reader(name, tables)
        if (written := found.values.pop("format", FORMAT)) != FORMAT:
            raise ConfigError(
                f"{name}: is in format {written!r}, expected {FORMAT}: another version of tiered wrote it"
            )
        cpu = found.table("cpu")
        gpu = found.table("gpu") if "gpu" in tables else None
        disk = found.table("disk")
        made = cls(
            name=found.text("name"),
            source=found.text("source"),
            is_measured=found.values.pop("is_measured", False) is True,
            ram=found.whole("ram"),
            disk=DiskRates(
                disk.number("read"),
                disk.number("write"),
                tuple((int(size), rate) for size, rate in sorted(disk.pairs("random"))),
                disk.optional("streamed"),
                disk.optional("kept"),
            ),
            cpu=_cpu(cpu),
            gpu=None if gpu is None else _gpu(gpu),
            usd_per_hour=found.optional("usd_per_hour"),
        )
        for table in (found, cpu, disk, *([] if gpu is None else [gpu])):
            table.check_empty()
        return made

    def to_tables(self) -> dict[str, Any]:
        """What `from_toml` reads, as plain tables."""
        disk = _known(self.disk)
        if random := disk.pop("random"):
            disk["random"] = [list(pair) for pair in random]
        linear = [
            {"scheme": one.scheme, "mode": one.mode, "rows": list(one.rate.rows)}
            | {"seconds_per_weight": list(one.rate.seconds_per_weight)}
            for one in self.cpu.linear
        ]
        cpu = _known(self.cpu) | {"linear": linear}
        attended = [
            {"bits": one.bits, "queries": list(one.rate.rows), "seconds_per_byte": list(one.rate.seconds_per_weight)}
            for one in cpu.pop("attended")
        ]
        if attended:
            cpu["attended"] = attended
        tables: dict[str, Any] = {"format": FORMAT, "name": self.name, "source": self.source}
        tables["is_measured"] = self.is_measured
        tables["ram"] = self.ram
        if self.usd_per_hour is not None:
            tables["usd_per_hour"] = self.usd_per_hour
        tables |= {"disk": disk, "cpu": cpu}
        if self.gpu is not None:
            tables["gpu"] = _known(self.gpu)
        return tables


def _known(rates: DiskRates | CpuRates | GpuRates) -> dict[str, Any]:
    """What is known of them: TOML has no word for the rest."""
    return {name: value for name, value in vars(rates).items() if value is not None}


def bytes_per_weight(scheme: str) -> float:
    """Of a layer's scheme: codes and, for each group, a scale and, for integers, a zero; "none": 16 bits.

    Raises ConfigError for any other.
    """
    found = _SCHEME.fullmatch(scheme)
    if found is None and scheme != "none":
        raise ConfigError(f"scheme {scheme!r}: expected none, or a scheme with a group, such as int4-g64")
    if found is None:
        return 2.0
    return (1 if found[1] == "int8" else 0.5) + _SCALES_NBYTES.get(found[1], 3) / int(found[2])


def roofline(scheme: str, flops: float, memory: float, rows: Sequence[int] = ROWS) -> ComputeRate:
    """Seconds per weight of a machine of which only `flops` and memory bandwidth are known: reading the weight, or its
    multiply-adds, whichever takes longer (Williams et al., "Roofline", 2009)."""
    read = bytes_per_weight(scheme) / memory
    return ComputeRate(tuple(rows), tuple(max(read, 2 * count / flops) for count in rows))


def _cpu(table: "_Reader") -> CpuRates:
    """Measured linear layers, or `flops` of the whole processor, by scheme and mode or for all."""
    memory = table.number("memory")
    if "flops" in table.values:
        flops = table.number("flops")
        modes: tuple[Mode, ...] = ("invariant", "fast")
        linear = [LinearRate(scheme, mode, roofline(scheme, flops, memory)) for scheme in SCHEMES for mode in modes]
        attention, prefill_attention = memory, flops
    else:
        linear = [_linear(entry) for entry in table.tables("linear")]
        attention, prefill_attention = table.number("attention"), table.number("prefill_attention")
    attended = tuple(map(_attended, table.tables("attended"))) if "attended" in table.values else ()
    if len({one.bits for one in attended}) < len(attended):
        raise ConfigError(f"{table.name}: expected one table of attended for each number of bits, found more of one")
    operation, element, reading, touch, quantize = map(
        table.optional, ("operation_seconds", "element_seconds", "reading_seconds", "touch", "quantize")
    )
    plain = table.whole("cores"), memory, attention, prefill_attention, tuple(linear)
    return CpuRates(*plain, operation, element, reading, touch, quantize, attended)


def _linear(table: "_Reader") -> LinearRate:
    mode = table.text("mode")
    if mode not in ("invariant", "fast"):
        raise ConfigError(f"{table.name}: expected a mode of invariant or fast, found {mode!r}")
    rate = _compute_rate(table, "rows", "seconds_per_weight")
    found = LinearRate(table.text("scheme"), "fast" if mode == "fast" else "invariant", rate)
    table.check_empty()
    return found


def _attended(table: "_Reader") -> AttendedRate:
    bits = table.whole("bits")
    if bits not in BITS_BY_NAME.values():
        raise ConfigError(f"{table.name}: expected bits of 16, 8 or 4, found {bits}")
    found = AttendedRate(bits, _compute_rate(table, "queries", "seconds_per_byte"))
    table.check_empty()
    return found


def _compute_rate(table: "_Reader", counts_key: str, seconds_key: str) -> ComputeRate:
    counts, seconds = table.numbers(counts_key), table.numbers(seconds_key)
    if len(counts) != len(seconds) or sorted(set(counts)) != list(counts) or not all(map(_is_whole, counts)):
        raise ConfigError(
            f"{table.name}: expected whole {counts_key} in ascending order with as many {seconds_key}, found "
            f"{list(counts)} and {len(seconds)} times"
        )
    return ComputeRate(tuple(map(int, counts)), seconds)


def _gpu(table: "_Reader") -> GpuRates:
    return GpuRates(
        table.text("name"),
        table.whole("vram"),
        table.number("host_to_device"),
        table.number("device_to_host"),
        table.number("memory"),
        table.number("flops"),
    )


def _is_whole(number: float) -> bool:
    return number == int(number)


class _Reader:
    """Takes values out of a table and names what is wrong; what is left over is unknown."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name, self.values = name, dict(values)

    def _take(self, key: str, wanted: str) -> Any:
        if key not in self.values:
            raise ConfigError(f"{self.name}: has no {key!r}, expected {wanted}")
        return self.values.pop(key)

    def number(self, key: str) -> float:
        """A number above 0."""
        found = self._take(key, "a number above 0")
        return self._checked(key, found)

    def optional(self, key: str) -> float | None:
        """A number above 0; None where there is no such key."""
        return self.number(key) if key in self.values else None

    def whole(self, key: str) -> int:
        """A whole number above 0."""
        found = self.number(key)
        if not _is_whole(found):
            raise ConfigError(f"{self.name}: {key} = {found!r}, expected a whole number above 0")
        return int(found)

    def _checked(self, key: str, found: object) -> float:
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < float("inf"):
            raise ConfigError(f"{self.name}: {key} = {found!r}, expected a number above 0")
        return found

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers above 0, not empty."""
        found = self._take(key, "a list of numbers above 0")
        if not isinstance(found, list) or not found:
            raise ConfigError(f"{self.name}: {key} = {found!r}, expected a list of numbers above 0")
        return tuple(self._checked(key, one) for one in found)

    def pairs(self, key: str) -> list[tuple[float, float]]:
        """A list of pairs of numbers above 0; none where there is no such key."""
        pairs = self.values.pop(key, [])
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ConfigError(f"{self.name}: {key} = {pairs!r}, expected a list of pairs of numbers above 0")
        return [(self._checked(key, first), self._checked(key, second)) for first, second in pairs]

    def text(self, key: str) -> str:
        found = self._take(key, "a text")
        if not isinstance(found, str) or not found:
            raise ConfigError(f"{self.name}: {key} = {found!r}, expected a text")
        return found

    def table(self, key: str) -> "_Reader":
        found = self._take(key, "a table")
        if not isinstance(found, dict):
            raise ConfigError(f"{self.name}: {key} = {found!r}, expected a table")
        return _Reader(f"{self.name}, {key}", found)

    def tables(self, key: str) -> list["_Reader"]:
        found = self._take(key, "one or more tables")
        if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
            raise ConfigError(f"{self.name}: {key} = {found!r}, expected one or more tables")
        return [_Reader(f"{self.name}, {key} {number}", one) for number, one in enumerate(found, 1)]

    def check_empty(self) -> None:
        """Raise ConfigError for what nobody has asked for."""
        if self.values:
            raise ConfigError(f"{self.name}: unknown {', '.join(map(repr, sorted(self.values)))}")

"""A machine in TOML: read, written and read again, and what is wrong with one named."""

from dataclasses import replace
from typing import Any

import pytest

from tiered.errors import ConfigError
from tiered.plan import ComputeRate, KVShape, Machine
from tiered.plan.hardware import AttendedRate, DiskRates, Hardware, LinearRate, bytes_per_weight, roofline
from tiered.quant import Scheme

DESCRIBED = """
name = "two cores"
source = "made up"
ram = 16_000_000_000
usd_per_hour = 0.5
[disk]
read = 2e9
write = 1e9
random = [[1_000_000, 5e8], [16_000_000, 1.5e9]]
[cpu]
cores = 2
memory = 2e10
flops = 1e12
[gpu]
name = "T4"
vram = 16_000_000_000
host_to_device = 1.2e10
device_to_host = 1.2e10
memory = 3e11
flops = 5e13
"""

ATTENDED = "[[cpu.attended]]\nbits = {}\nqueries = {}\nseconds_per_byte = [1.0, 1.0]\n"
LINEAR = 'linear = [{ scheme = "none", mode = "fast", rows = [0.5, 1], seconds_per_weight = [1.0, 1.0] }]'


def test_fewer_rows_than_were_measured_take_as_long_as_the_fewest() -> None:
    assert ComputeRate((8, 16), (1e-9, 9e-9)).seconds(1, 10**9) == 1.0


def test_a_described_machine_computes_along_its_roofline() -> None:
    machine = Hardware.from_toml(DESCRIBED, "described")
    rate = machine.cpu.linear_rate("int4-g64", "fast")
    assert rate.seconds(1, 10**9) == pytest.approx(35 / 64 / 2e10 * 1e9)  # memory
    assert rate.seconds(512, 10**9) == pytest.approx(2 * 512 / 1e12 * 1e9)  # multiply-adds
    assert roofline("none", 1e12, 2e10).seconds(1, 1) == pytest.approx(1e-10)
    assert machine.cpu.attention == 2e10 and machine.gpu is not None and machine.gpu.name == "T4"
    made = machine.machine("int8-g64", "invariant", KVShape(8, 128, 128, "bfloat16"), 7)
    assert (made.scratch_nbytes, made.disk_bytes_per_second) == (7, 2e9)
    assert made.attention_seconds == pytest.approx(2 * 8 * 128 * 2 / 2e10)


def test_random_reads_lie_between_what_was_measured() -> None:
    disk = DiskRates(2e9, 1e9, ((1_000_000, 5e8), (16_000_000, 1.5e9)))
    assert disk.random_read(1) == 5e8 and disk.random_read(10**9) == 1.5e9
    assert 5e8 < disk.random_read(2_500_000) < disk.random_read(8_000_000) < 1.5e9
    assert DiskRates(2e9, 1e9).random_read(1) == 2e9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("read = 2e9", "read = 0", "described, disk: read = 0, expected a number above 0"),
        ("read = 2e9", "read = -1.0", "expected a number above 0"),
        ("read = 2e9", "read = inf", "expected a number above 0"),
        ("read = 2e9", "read = true", "expected a number above 0"),
        ("read = 2e9", "reads = 2e9", "described, disk: has no 'read', expected a number above 0"),
        ("cores = 2", "cores = 0.5", "cores = 0.5, expected a whole number above 0"),
        ("flops = 1e12", "attention = 1.0\nprefill_attention = 1.0\n" + LINEAR, "whole rows in ascending order"),
        (
            "[gpu]",
            ATTENDED.format(2, "[1, 2]") + "[gpu]",
            "attended 1: expected bits of 16, 8 or 4, found 2",
        ),
        (
            "[gpu]",
            ATTENDED.format(4, "[2, 1]") + "[gpu]",
            "attended 1: expected whole queries in ascending order",
        ),
        ("[gpu]", 2 * ATTENDED.format(4, "[1, 2]") + "[gpu]", "expected one table of attended for each number of bits"),
        ("[gpu]", ATTENDED.format(4, "[1, 2]\nrows = 1") + "[gpu]", "described, cpu, attended 1: unknown 'rows'"),
        ("cores = 2", "cores = 2\nsockets = 1", "described, cpu: unknown 'sockets'"),
        ("flops = 1e12", "linear = []", "described, cpu: linear = .*expected one or more tables"),
        ("ram = 16", "format = 3\nram = 16", "described: is in format 3, expected 2"),
        ('name = "two cores"', "name = 2", "name = 2, expected a text"),
        ("write = 1e9", "write = 1e9\nkept = 0", "described, disk: kept = 0, expected a number above 0"),
        ("[disk]", "[disk", "is no TOML file"),
        ("[disk]", "disk = 1\n[disc]", "disk = 1, expected a table"),
        ("[[1_000_000, 5e8]", "[[1_000_000]", "expected a list of pairs"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    assert old in DESCRIBED
    with pytest.raises(ConfigError, match=message):
        Hardware.from_toml(DESCRIBED.replace(old, new, 1), "described")


def test_a_speed_that_is_not_known_is_no_guess() -> None:
    with pytest.raises(ConfigError, match="no speed of linear layers in int3, fast mode; there are int4-g64 invariant"):
        Hardware.from_toml(DESCRIBED, "described").cpu.linear_rate("int3", "fast")


def test_groups_of_another_size_take_the_time_of_their_bytes() -> None:
    cpu = Hardware.from_toml(DESCRIBED, "described").cpu
    measured, finer = (cpu.linear_rate(scheme, "invariant") for scheme in ("int4-g64", "int4-g32"))
    assert finer.rows == measured.rows
    assert finer.seconds_per_weight[0] == pytest.approx(measured.seconds_per_weight[0] * (19 / 32) / (35 / 64))


@pytest.mark.parametrize("name", ["int4-g64", "int8-g32", "mxfp4-g32", "nf4-g64", "iq4nl-g32"])
def test_a_weight_takes_the_bytes_of_its_scheme_and_codes_that_are_looked_up_compute_as_int4(name: str) -> None:
    assert bytes_per_weight(name) == Scheme.parse(name).nbytes(1, 128) / 128
    cpu = Hardware.from_toml(DESCRIBED, "described").cpu
    share = bytes_per_weight(name) / bytes_per_weight("int8-g64" if name.startswith("int8") else "int4-g64")
    known = cpu.linear_rate("int8-g64" if name.startswith("int8") else "int4-g64", "fast")
    assert cpu.linear_rate(name, "fast").seconds(1, 1) == pytest.approx(share * known.seconds(1, 1))
    # As it is where a model's own scheme is all that was measured.
    own = replace(cpu, linear=(LinearRate(name, "fast", known),))
    assert own.linear_rate(name, "fast") == known


def test_written_down_and_read_back_it_is_the_same_machine() -> None:
    machine = Hardware.from_toml(DESCRIBED, "described")
    disk = replace(machine.disk, streamed=0.9, kept=1e9)
    cpu = replace(machine.cpu, operation_seconds=1e-6, element_seconds=1e-8, reading_seconds=1e-10, touch=1e9)
    cpu = replace(cpu, quantize=1e9, attended=(AttendedRate(4, ComputeRate((1, 8), (1e-10, 2e-10))),))
    for each in (machine, replace(machine, disk=disk, cpu=cpu)):
        assert Hardware.from_toml(as_toml(each.to_tables()), "again") == each


def test_what_passes_take_beyond_raw_reading_is_counted_where_it_was_measured() -> None:
    machine = Hardware.from_toml(DESCRIBED.replace("write = 1e9", "write = 1e9\nstreamed = 0.9\nkept = 1e9"), "mine")
    kv = KVShape(8, 128, 2, "bfloat16")
    made = machine.machine("int8-g64", "invariant", kv, 7)
    assert made.disk_bytes_per_second == pytest.approx(1.8e9) and made.kept_bytes_per_second == 1e9
    assert made.operation_seconds == made.element_seconds == made.reading_seconds == made.touch_seconds(1e9) == 0


def test_attention_goes_by_bits_and_by_queries_that_share_a_key_where_that_was_measured() -> None:
    machine, kv = Hardware.from_toml(DESCRIBED, "mine"), KVShape(8, 128, 128, "bfloat16")
    plain = machine.machine("int8-g64", "invariant", kv, 7, queries=4)
    assert plain.keeping(4) == plain
    token, attended = 2 * 8 * 128 * 2, (AttendedRate(4, ComputeRate((1, 3), (1e-9, 3e-9))),)
    made = replace(machine, cpu=replace(machine.cpu, quantize=1e6, attended=attended))
    for queries, seconds in ((1, 1e-9), (2, 2e-9), (6, 6e-9)):
        found = made.machine("int8-g64", "invariant", kv, 7, queries)
        assert found.keeping(16) == found.keeping(8) == found
        assert found.attention_seconds == pytest.approx(token / machine.cpu.attention) and not found.store_seconds
        assert found.keeping(4).attention_seconds == pytest.approx(token * seconds)
        assert found.keeping(4).store_seconds == pytest.approx(token / 1e6)
        assert found.keeping(4).recent_attention_seconds == found.attention_seconds
        assert found.keeping(4).keeping(16) == found.keeping(4)
    wide = made.machine("int8-g64", "invariant", KVShape(8, 128, 128, "float32"), 7)
    assert wide.keeping(4).attention_seconds == pytest.approx(token * 1e-9)
    assert wide.attention_seconds == pytest.approx(2 * token / machine.cpu.attention)
    # Latents are multiplied as keys and as values.
    latent = made.machine("int8-g64", "invariant", KVShape(1, 576, 0, "bfloat16"), 7, 2)
    assert latent.keeping(4).attention_seconds == pytest.approx(2 * 576 * 4e-9)


@pytest.mark.parametrize(
    ("kept", "touch", "rates"),
    [(1e9, 3e8, (3e8, 1e9)), (1e9, 5e9, (1e9, 1e9)), (None, 5e9, (2e9, 2e9)), (None, 3e8, (3e8, 2e9))],
)
def test_what_stays_is_read_no_faster_than_the_disk_reads_nor_than_memory_is_found_for_it(
    kept: float | None, touch: float, rates: tuple[float, float]
) -> None:
    made = Machine(0, 2e9, kept_bytes_per_second=kept, touch_bytes_per_second=touch)
    assert (made.kept_rate(is_touched=False), made.kept_rate(is_touched=True)) == rates


def as_toml(tables: dict[str, Any], path: str = "") -> str:
    """The tables as a person would write them."""
    lines, nested = [], []
    for key, value in tables.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            nested.append(f"[{name}]\n{as_toml(value, name)}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            nested += [f"[[{name}]]\n{as_toml(one, name)}" for one in value]
        else:
            lines.append(f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}")
    return "\n".join(lines + nested) + "\n"

"""`tiered profile`: measures this machine and the disk of a folder, shows the figures and keeps them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tiered.bench.plot import check_can_draw
from tiered.bench.profile import is_disturbed, measure_hardware
from tiered.cli import profile_plot
from tiered.cli.lines import columns, print_json
from tiered.cli.screen import StatusLine
from tiered.cli.writable import check_writable
from tiered.errors import ConfigError, TieredError
from tiered.plan import cpu_count
from tiered.plan.hardware import ROWS, Hardware
from tiered.plan.machines import load_hardware, profile_path, save_hardware
from tiered.store import read_manifest
from tiered.units import format_rate, format_size


def run(
    store: Path | None, folder: Path | None, as_json: bool, plot: Path | None, output: Path | None, threads: int | None
) -> None:
    """Measure, show, keep. What cannot be written is refused before anything is measured. Raises TieredError, after
    the figures, where other programs disturbed them and the profile that is there was measured in peace."""
    if store is not None and folder is not None:
        raise ConfigError(f"{store} and --dir {folder}: expected one of them, as one disk is measured; leave one out")
    measured, files = folder or store or Path(), block_files(store) if store is not None else []
    path = output or profile_path(measured)
    check_writable("-o", path, makes_folder=output is None)
    if plot is not None:
        check_can_draw("--plot", plot)
        check_writable("--plot", plot)
    with StatusLine() as status:
        hardware = measure_hardware(measured, files, threads or cpu_count(), status.say)
    is_kept = output is not None or not is_disturbed(hardware) or not _is_calm(path)
    if is_kept:
        save_hardware(hardware, path)
    if plot is not None:
        profile_plot.draw(hardware, plot)
    if as_json:
        print_json({"profile": str(path) if is_kept else None, **hardware.to_tables()})
    else:
        for line in lines(hardware):
            click.echo(line)
        if is_kept:
            disturbed = "; other programs ran: measure again when nothing else does" if is_disturbed(hardware) else ""
            click.echo(f"\nkept in {path}{disturbed}")
    if not is_kept:
        raise TieredError(
            f"{path}: is kept as it was, as it was measured while other programs took less of the processors; measure "
            "again when nothing else runs, or write to another file with -o"
        )


def _is_calm(path: Path) -> bool:
    """Whether there is a profile at `path` that nothing disturbed; one that cannot be read is worth nothing."""
    try:
        return not is_disturbed(load_hardware(str(path)))
    except ConfigError:
        return False


def block_files(store: Path) -> list[Path]:
    """The files that a pass over the store at `store` reads; raises StoreError where it is none."""
    manifest = read_manifest(store)
    return [path for path in (store / info.path for info in manifest.files) if path.is_file()]


def lines(hardware: Hardware) -> Iterator[str]:
    """The figures as people read them."""
    yield hardware.name
    yield hardware.source
    yield ""
    yield from columns(list(_figures(hardware)), "<><")
    if attended := hardware.cpu.attended:
        yield ""
        yield "attention of decoding: GB/s of keys and values, counted as in 16 bits"
        header = ["queries to a key", *(f"{one.bits} bits" for one in attended)]
        body = [
            [str(queries), *(f"{1e-9 / one.rate.seconds(queries, 1):.2f}" for one in attended)]
            for queries in attended[0].rate.rows
        ]
        yield from columns([header, *body], ">" * len(header))
    for title, mode in (("invariant kernels", "invariant"), ("fast kernels", "fast")):
        found = {one.scheme: one.rate for one in hardware.cpu.linear if one.mode == mode}
        if not found:
            continue
        yield ""
        yield f"linear layers, {title}: GFLOP/s and, in brackets, weights per second in 10^9"
        header = ["rows", *(scheme if scheme != "none" else "16 bits" for scheme in found)]
        body = [
            [str(rows), *(_speed(rate.seconds(rows, 10**9) / 1e9, rows) for rate in found.values())] for rows in ROWS
        ]
        yield from columns([header, *body], ">" * len(header))


def _figures(hardware: Hardware) -> Iterator[tuple[str, str, str]]:
    disk, cpu, gpu = hardware.disk, hardware.cpu, hardware.gpu
    yield "disk", format_rate(disk.read), "read in file order, sustained"
    for nbytes, rate in disk.random:
        yield "", format_rate(rate), f"read at random places, {nbytes / 1e6:g} MB each"
    if disk.streamed is not None:
        yield "", f"{disk.streamed:.0%}", "of what is sustained, by passes over a model"
    if disk.kept is not None:
        yield "", format_rate(disk.kept), "by a first pass, for what then stays in memory"
    yield "", format_rate(disk.write), "written"
    yield "memory", format_rate(cpu.memory), f"read by {cpu.cores} threads; {format_size(hardware.ram)} in all"
    if cpu.touch is not None:
        yield "", format_rate(cpu.touch), "touched for the first time, by one thread"
    yield "attention", format_rate(cpu.attention), "of keys and values that decoding attends over"
    if cpu.quantize is not None:
        yield "", format_rate(cpu.quantize), "of new keys and values quantized, to 8 or 4 bits"
    yield "", f"{cpu.prefill_attention / 1e9:.0f} GFLOP/s", "of a prompt"
    if cpu.operation_seconds is not None:
        yield "operation", f"{cpu.operation_seconds * 1e6:.3g} us", "beside linear layers, however few the rows"
    if cpu.element_seconds is not None:
        yield "", f"{cpu.element_seconds * 1e9:.3g} ns", "more for each number that it writes"
    if cpu.reading_seconds is not None:
        yield "reading", f"{cpu.reading_seconds * 1e9:.3g} s", "that computing takes longer per GB read meanwhile"
    if gpu is None:
        yield "gpu", "none", "seen by torch"
        return
    yield "gpu", format_size(gpu.vram), gpu.name
    yield "", format_rate(gpu.host_to_device), "to it from pinned memory"
    yield "", format_rate(gpu.device_to_host), "back"
    yield "", format_rate(gpu.memory), "of its memory"
    yield "", f"{gpu.flops / 1e12:.1f} TFLOP/s", "of matrix products in 16 bits"


def _speed(seconds_per_weight: float, rows: int) -> str:
    return f"{2 * rows / seconds_per_weight / 1e9:.0f} ({1e-9 / seconds_per_weight:.2f})"


def summary(hardware: Hardware) -> list[tuple[str, str, Any]]:
    """Label, text and value of what `tiered doctor` shows of a profile."""
    disk, cpu = hardware.disk, hardware.cpu
    found: list[tuple[str, str, Any]] = [("source", hardware.source, hardware.source)]
    rates = {"disk read": disk.read, "disk write": disk.write, "memory read": cpu.memory, "attention": cpu.attention}
    found += [(label, format_rate(rate), rate) for label, rate in rates.items()]
    return found

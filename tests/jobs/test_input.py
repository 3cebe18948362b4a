"""The input is read as it is needed, known by its contents, and costs next to nothing per line."""

import json
import os
import tracemalloc
from collections.abc import Callable
from io import BytesIO
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.jobs.fakes import request, write_lines
from tests.quick import examples
from tiered.errors import ConfigError
from tiered.jobs import scan_input
from tiered.jobs.input import LONGEST_LINE_NBYTES, LineSet, read_lines


def duplicates(path: Path, hash_id: Callable[[bytes], int] | None = None) -> list[int]:
    found = scan_input(path, hash_id=hash_id)
    return [line for line in range(1, found.lines + 1) if line in found.duplicates]


@examples(200)
@given(content=st.binary(max_size=60).map(lambda raw: raw.replace(b"\x00", b"\n")), nbytes=st.integers(0, 70))
def test_lines_are_those_of_the_file_up_to_a_byte(content: bytes, nbytes: int) -> None:
    seen = bytearray()
    found = list(read_lines(BytesIO(content), nbytes, seen.extend))
    assert b"".join(line.raw for line in found) == bytes(seen) == content[:nbytes]
    assert [line.number for line in found] == list(range(1, len(found) + 1))
    for line in found:
        assert content[line.offset :].startswith(line.raw)
        assert b"\n" not in line.raw[:-1]


def test_a_line_too_long_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    long = request("long", prompt="x" * (3 * LONGEST_LINE_NBYTES))
    path = write_lines(tmp_path / "in", [request("a"), long, request("b")])
    tracemalloc.start()
    found = [(line.number, line.is_too_long, len(line.raw)) for line in scan_input(path).read()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line[:2] for line in found] == [(1, False), (2, True), (3, False)]
    assert found[1][2] == 100
    assert peak < 2.5 * LONGEST_LINE_NBYTES


def test_blank_lines_count_and_ask_for_nothing(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", ["", request("a"), "   ", "\t\r", request("b")])
    found = scan_input(path)
    assert (found.lines, found.requests) == (5, 2)
    assert [line.number for line in found.read()] == [2, 5]


def test_a_last_line_without_its_end_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text(f"{request('a')}\n{request('b')}", encoding="utf-8")
    assert [line.number for line in scan_input(path).read()] == [1, 2]


def test_every_byte_counts_for_the_fingerprint(tmp_path: Path) -> None:
    contents = ["a\n", "a", "b\n", "a\n\n", "\na\n", ""]
    prints = set()
    for content in contents:
        (tmp_path / "in").write_text(content, encoding="utf-8")
        prints.add(scan_input(tmp_path / "in").fingerprint)
    assert len(prints) == len(contents)


def test_what_is_appended_after_the_scan_is_left_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", [request("a"), request("b")])
    found = scan_input(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(request("c") + "\n")
    assert [line.number for line in found.read()] == [1, 2]


def test_lines_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", (request(str(number)) for number in range(100_000)))
    found = scan_input(path)
    before = _bytes_read()
    lines = found.read()
    list(islice(lines, 3))
    assert _bytes_read() - before < 1 << 20 < found.nbytes
    lines.close()  # type: ignore[attr-defined]


def _bytes_read() -> int:
    """Bytes that this process has asked files for."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(fields["rchar"])


@pytest.mark.parametrize("name", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=name):
        scan_input(tmp_path / name)


# Duplicates.


def test_the_later_line_of_a_custom_id_is_the_duplicate(tmp_path: Path) -> None:
    ids = ["a", "b", "a", "c", "b", "a"]
    path = write_lines(tmp_path / "in", ["", *map(request, ids)])
    assert duplicates(path) == [4, 6, 7]


def test_equal_custom_ids_are_found_however_they_are_spelled(tmp_path: Path) -> None:
    escaped = request("caf\u00e9")
    plain = json.dumps(json.loads(escaped), ensure_ascii=False)
    assert "\\u00e9" in escaped and "\u00e9" in plain
    assert duplicates(write_lines(tmp_path / "in", [escaped, plain, request("cafe")])) == [2]


def test_lines_without_a_proper_custom_id_are_no_duplicates(tmp_path: Path) -> None:
    nothing = ['{"custom_id": null}', '{"custom_id": 1}', "{}", "[]", "nonsense", '{"custom_id": ""}']
    assert duplicates(write_lines(tmp_path / "in", nothing * 2)) == []


def test_a_line_that_will_fail_still_owns_its_custom_id(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", [request("a", prompt=7), request("a")])
    assert duplicates(path) == [2]


@examples(100)
@given(ids=st.lists(st.sampled_from("abcdefgh"), max_size=20), buckets=st.integers(1, 4))
def test_hashes_that_collide_make_no_duplicates_and_hide_none(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], buckets: int
) -> None:
    path = write_lines(tmp_path_factory.mktemp("collide") / "in", map(request, ids))
    expected = [place + 1 for place, custom_id in enumerate(ids) if custom_id in ids[:place]]
    assert duplicates(path, lambda raw: raw[0] % buckets) == expected


def test_a_custom_id_on_the_first_line_after_a_byte_order_mark_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text(f"\ufeff{request('a')}\n{request('a')}\n", encoding="utf-8")
    assert duplicates(path) == [2]


# Memory.


@examples(100)
@given(lines=st.lists(st.integers(0, 70)))
def test_a_line_set_is_a_set(lines: list[int]) -> None:
    found = LineSet(70)
    for line in lines:
        found.add(line)
    assert {line for line in range(71) if line in found} == set(lines)
    assert len(found) == len(set(lines))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "times"),
    [(10_000, 1), (6_000, 2), (6_000, 6_000)],
    ids=["distinct", "every one twice", "all the same"],
)
def test_a_line_costs_at_most_16_bytes(tmp_path: Path, lines: int, times: int) -> None:
    few, many = (
        write_lines(tmp_path / str(count), (request(f"id-{number // times}") for number in range(count)))
        for count in (1000, lines)
    )
    peaks = []
    for path in (few, few, many, many):
        tracemalloc.start()
        found = scan_input(path)
        for line in found.read():
            found.duplicates.add(line.number)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # What another thread of this process allocates meanwhile is counted too: the lesser of two.
    assert min(peaks[2:]) - peaks[1] <= 16 * (lines - 1000)

"""Every form of output has the figures, the machine and the command."""

import csv
import io
import json
from html.parser import HTMLParser

import pytest

from tests.bench.made_up import MACHINE, STORE, run
from tiered.bench.output import Result, as_csv, as_json, markdown
from tiered.bench.page import page
from tiered.bench.rows import rows
from tiered.bench.workload import Setting


@pytest.fixture
def result() -> Result:
    runs = [run(), run(Setting(prompt_tokens=100, new_tokens=10, batch=8, kv="disk"))]
    found = rows(runs, {"none": STORE})
    command = "tiered bench <opt-13b> -p 100"
    return Result(command, MACHINE, [STORE], "cold", found, runs, ["batch 9: killed"])


def test_markdown_is_a_table_below_its_facts(result: Result) -> None:
    lines = markdown(result).splitlines()
    assert "- command: `tiered bench <opt-13b> -p 100`" in lines
    assert f"- machine: {MACHINE.name}" in lines and "- disk: ext4 on vda" in lines
    assert "- raw disk: 2.50 GB/s to 2.50 GB/s, measured after each run" in lines
    assert "- **batch 9: killed**" in lines
    table = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert len({len(line) for line in table}) == 1 and len(table) == 2 + 6
    assert table[2][0] == "| opt-13b int4-g64" and "50.0" in table[2] and "pp100" in table[2]


def test_json_and_csv_have_the_same_rows(result: Result) -> None:
    value = json.loads(as_json(result))
    assert (value["command"], value["machine"]["name"]) == (result.command, MACHINE.name)
    assert len(value["runs"]) == 2 and value["runs"][0]["report"]["kernels"] == "avx512, invariant, 2 threads"
    lines = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert [line["test"] for line in lines] == [row["test"] for row in value["rows"]]
    assert {line["command"] for line in lines} == {result.command}
    assert float(lines[0]["tokens_per_second"]) == value["rows"][0]["tokens_per_second"]


def test_a_page_stands_for_itself(result: Result) -> None:
    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.sources: list[str | None] = []
            self.texts: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.sources += [value for name, value in attrs if name in ("src", "href")]

        def handle_data(self, data: str) -> None:
            self.texts.append(data)

    parser = Page()
    parser.feed(page(result, b"picture"))
    assert parser.sources == ["data:image/png;base64,cGljdHVyZQ=="]
    assert markdown(result) in parser.texts
    assert "tiered bench <opt-13b> -p 100" in parser.texts and "2 cores (made up), Linux 6" in parser.texts


def test_without_rows_there_is_no_table(result: Result) -> None:
    empty = Result(result.command, MACHINE, [STORE], "cold", [], [], ["interrupted after 0 of 2 runs"])
    assert "|" not in markdown(empty)
    assert as_csv(empty).splitlines() == ["command,machine,disk"]
    assert "<table>" not in page(empty, None)

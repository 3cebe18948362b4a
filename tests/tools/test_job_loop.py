"""What the killing of conversions compares; a few kills are in tests/convert/test_resume.py."""

import shutil
from pathlib import Path

from tests.commands import make_store
from tools.job_loop import store_differences


def test_the_comparison_sees_what_is_missing_left_over_or_different(tmp_path: Path) -> None:
    whole = make_store(tmp_path)
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    assert store_differences(other, whole) == []
    (other / "conversion.json").touch()
    (other / "tokenizer.json").unlink()
    (other / "blocks" / "outer.safetensors").write_bytes(b"")
    assert store_differences(other, whole) == [
        "conversion.json: left over",
        "tokenizer.json: missing",
        "blocks/outer.safetensors: other bytes",
    ]

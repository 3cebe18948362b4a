"""Predictions against runs: which shapes there are."""

import pytest

from tools.check_predictions import main


def test_a_shape_without_settings_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--shape", "opt-6.7b", "--shape", "opt-1b"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "'opt-1b'" in said and "opt-13b" in said

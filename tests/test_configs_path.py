"""The shipped configurations are found in a checkout and in an installed package alike."""

from pathlib import Path

import pytest

from tiered.configs_path import config_dir, first_config_dir
from tiered.errors import ConfigError


def test_this_installation_has_model_shapes() -> None:
    assert list((config_dir() / "models").glob("*.toml"))


@pytest.mark.parametrize("place", ["site/tiered/configs", "site/configs"], ids=["wheel", "checkout"])
def test_both_places_are_found(tmp_path: Path, place: str) -> None:
    (tmp_path / place / "models").mkdir(parents=True)
    assert first_config_dir(tmp_path / "site" / "tiered") == tmp_path / place


def test_a_folder_inside_the_package_comes_first(tmp_path: Path) -> None:
    for place in ("tiered/configs/models", "configs/models"):
        (tmp_path / place).mkdir(parents=True)
    assert first_config_dir(tmp_path / "tiered") == tmp_path / "tiered" / "configs"


def test_a_missing_folder_names_both_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiered/configs and .*configs, found none"):
        first_config_dir(tmp_path / "tiered")

"""What pyproject.toml cannot say: the found packages, plus configs/ as the data package `tiered.configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tiered", "tiered.*"]), "tiered.configs"],
    package_dir={"tiered.configs": "configs"},
)

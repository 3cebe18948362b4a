"""What the process that tests/warm.py forks from imports: whatever commands use, set as they set it themselves."""

import importlib
import os

# As `tiered.cli.main` does, before what reads them is imported.
os.environ.update(TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")

for name in ("convert", "generate", "batch", "score", "texts"):
    importlib.import_module(f"tiered.cli.{name}")
importlib.import_module("tests.warm")

"""What the process that tests/warm.py forks from imports: whatever commands use, set as they set it themselves."""

import gc
import importlib
import os

# As `tiered.cli.main` does, before what reads them is imported.
os.environ.update(TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")

gc.disable()
for name in ("convert", "generate", "batch", "score", "texts", "verify"):
    importlib.import_module(f"tiered.cli.{name}")
importlib.import_module("tests.warm")
# A forked process would otherwise look through all of it, and copy what it looks at.
gc.freeze()
gc.enable()

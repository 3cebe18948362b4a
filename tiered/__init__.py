"""tiered: run language models that do not fit in memory, at the speed of the disk."""

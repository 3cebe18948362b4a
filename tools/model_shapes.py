"""Writes configs/models/shapes.json: the shapes of all configs/models, which 'tiered plan' then knows without a graph.

Run it after a change of configs/models, of how stores are laid out, or of what a shape says; a test compares.

    python tools/model_shapes.py [NAME ...]
"""

import json
import sys
import time

from tiered.configs_path import config_dir
from tiered.convert.synthetic import ShapeFile, shape_config
from tiered.plan.shapes import SHAPES_NAME, digest, shape_to_json
from tiered.shapes import config_shapes


def main(names: list[str]) -> None:
    """Make the shapes of `names`, or of all."""
    models = config_dir() / "models"
    target = models / SHAPES_NAME
    known = sorted(path.stem for path in models.glob("*.toml"))
    old = json.loads(target.read_text()) if target.exists() else {}
    table = {name: old[name] for name in known if name in old}
    for name in names or known:
        started = time.perf_counter()
        path = models / f"{name}.toml"
        shapes = config_shapes(shape_config(ShapeFile.read(path)))
        table[name] = {"of": digest(path)} | {quant: shape_to_json(shape) for quant, shape in shapes.items()}
        lines = (f"{json.dumps(each)}:{json.dumps(table[each], separators=(',', ':'))}" for each in sorted(table))
        # After each: a large mixture takes a while, and what was made before it stays.
        target.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

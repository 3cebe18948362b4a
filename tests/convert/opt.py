"""Small OPT models, and the forms that `tools.opt_forms` writes of them."""

from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tiered.configs_path import config_dir
from tiered.convert.synthetic import ShapeFile
from tools.opt_forms import write_form

SHAPE: Final = ShapeFile.read(config_dir() / "models" / "tiny-opt.toml")
"""Found by its sizes, as those of the published models are."""
FORMS: Final[dict[str, dict[str, Any]]] = {
    "raw": {"parts": 2, "shards": 3},
    "raw, many": {"parts": 4, "shards": 13, "legacy": True},
    "resharded": {"parts": 4, "series": "checkpoint_1_8000"},
    "resharded, legacy": {"parts": 2, "legacy": True},
    "singleton": {},
    "numpy": {},
}


def opt_model(**changes: Any) -> PreTrainedModel:
    """A random model of the shape, the same each time."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(**{**SHAPE.config, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: constants would hide a mix-up
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def write(folder: Path, model: PreTrainedModel, form: str, **changes: Any) -> Path:
    """The folder with `model` in a form of `FORMS`."""
    return write_form(form.partition(",")[0], folder, model.state_dict(), **{**FORMS[form], **changes})

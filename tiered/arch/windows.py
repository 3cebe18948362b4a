"""Which layers look back a limited number of tokens, by the model's configuration: the cache keeps no more for them.

What attention really asks for is compared with this at run time (`model/attention.py`), so a family whose
configuration means something else is found out and not misread.
"""

from transformers import PretrainedConfig

from tiered.arch.families import FAMILIES

_SLIDING = ("sliding_attention", "local_attention")


def layer_windows(config: PretrainedConfig) -> tuple[int, ...]:
    """Of each decoder layer, the tokens that a query sees, itself included; 0: all before it."""
    count = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    family = FAMILIES.get(config.model_type)
    if not window or (family is not None and family.gathers) or getattr(config, "use_sliding_window", True) is False:
        return (0,) * count
    types = getattr(config, "layer_types", None) or [_SLIDING[0]] * count
    return tuple(int(window) if kind in _SLIDING else 0 for kind in types)

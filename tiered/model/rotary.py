"""Rotary embeddings whose frequencies depend on how long the text is ("dynamic" and "longrope" scaling).

transformers takes the length from the largest position of a call: in a micro-batch that is where the micro-batch ends,
in a batch where its longest text ends, and "dynamic" also remembers the longest text so far. A stand-in adds the end of
each row's own text, so that neither micro-batches nor neighbours nor earlier texts change the result.
"""

from typing import Any

import torch
from torch import nn


class WholeTextRotary(nn.Module):
    """Takes a rotary embedding's place: each text gets the tables that it would get whole and on its own."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self.last_positions: torch.Tensor | None = None
        """Position of the last token of the text: for each row [rows], for all rows [1], or for each token [1, tokens]
        where several texts lie side by side in one row. In the host's memory. None: a call holds whole texts."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [rows, tokens, dim] each, of position_ids [rows, tokens]; x gives dtype and device."""
        if self.last_positions is not None and self.last_positions.ndim == 2:
            # Neighbours whose texts end at the same position have the same frequencies.
            ends, counts = self.last_positions[0].unique_consecutive(return_counts=True)
            rows = position_ids[0].split(counts.tolist())
            tables = [self._row(x[:1], row, end, kwargs) for row, end in zip(rows, ends, strict=True)]
            return torch.cat([cos for cos, _ in tables], 1), torch.cat([sin for _, sin in tables], 1)
        last = position_ids.amax(1) if self.last_positions is None else self.last_positions.expand(len(position_ids))
        tables = [self._row(x[:1], row, end, kwargs) for row, end in zip(position_ids, last, strict=True)]
        return torch.cat([cos for cos, _ in tables]), torch.cat([sin for _, sin in tables])

    def _row(
        self, x: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A text of one token makes "dynamic" forget longer ones.
        self.rotary(x, positions.new_zeros(1, 1), **kwargs)
        cos, sin = self.rotary(x, torch.cat([positions, last[None].to(positions.device)])[None], **kwargs)
        return cos[:, :-1], sin[:, :-1]


def stand_in_for_rotaries(model: nn.Module) -> tuple[WholeTextRotary, ...]:
    """Replace the length-dependent rotary embeddings of `model`, and return what took their places."""
    found = [name for name, module in model.named_modules() if _depends_on_length(module)]
    stand_ins = []
    for name in found:
        path, _, attribute = name.rpartition(".")
        stand_ins.append(WholeTextRotary(model.get_submodule(name)))
        setattr(model.get_submodule(path), attribute, stand_ins[-1])
    return tuple(stand_ins)


def _depends_on_length(module: nn.Module) -> bool:
    """Whether `module` is a rotary embedding, of one type or one for each attention type, that depends on length."""
    types = getattr(module, "rope_type", None)
    return any(
        isinstance(name, str) and (name == "longrope" or "dynamic" in name)
        for name in (types.values() if isinstance(types, dict) else (types,))
    )

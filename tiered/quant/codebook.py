"""Codebooks of 16 values: what a nibble stands for, how their scales are stored, and the nearest entry of a weight.

    w[o, i] = values[code[o, i]] * scale[o, i // group_size]

is one product of float32 numbers, rounded once; of `mxfp4` and `iq4nl` it is exact. Values are as published: those of
E2M1 and E8M0 in the OCP Microscaling specification (version 1.0, sections 5.3.3 and 5.4.1), `nf4` in QLoRA (Dettmers et
al., 2023, appendix E) as bitsandbytes has it in float32, `iq4nl` in ggml (`kvalues_iq4nl`).
"""

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

E8M0: Final = torch.uint8
"""The dtype of scales that are exponents: a byte s stands for 2**(s - 127), and 255 for no number."""
_NAN: Final = 255
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Codebook:
    """16 values and the dtype of the scales that go with them."""

    values: tuple[float, ...]
    scale_dtype: torch.dtype
    """E8M0, float16 or float32."""

    @cache  # noqa: B019 - there are three of them, and few devices
    def table(self, device: torch.device) -> Tensor:
        """The values in float32 at `device`; not to be written to."""
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def scales(self, groups: Tensor) -> Tensor:
        """Scales, in their dtype, for the columns of `groups` [group, n] in float32: [n].

        E8M0: the largest magnitude's exponent less that of the largest value, as the specification says; what lies
        beyond the largest value then becomes it. Else the value of largest magnitude falls on the entry of largest
        magnitude; where there is none of the other sign, the scale turns the sign.
        """
        at = groups.abs().argmax(0, keepdim=True)
        peak = groups.gather(0, at).squeeze(0)
        extreme = max(self.values, key=abs)
        if -extreme in self.values:
            extreme, peak = abs(extreme), peak.abs()
        if self.scale_dtype == E8M0:
            exponent = torch.frexp(peak).exponent - torch.frexp(torch.tensor(extreme)).exponent
            within = torch.where(peak == 0, 0, exponent + 127).clamp(0, _NAN - 1)
            return torch.where(peak.isfinite(), within, _NAN).to(E8M0)
        return (peak / extreme).to(self.scale_dtype)

    def nearest(self, levels: Tensor) -> Tensor:
        """The code, u8, of the value nearest to each of `levels`, the lower one on a tie."""
        values, order = torch.tensor(self.values, dtype=torch.float32).sort(stable=True)
        return order.to(torch.uint8)[torch.bucketize(levels.contiguous(), (values[1:] + values[:-1]) / 2)]


CODEBOOKS: Final = {
    "mxfp4": Codebook((*_E2M1, *(-value for value in _E2M1)), E8M0),
    "nf4": Codebook(
        (
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
            *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
            *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023),
            1.0,
        ),
        torch.float32,
    ),
    "iq4nl": Codebook(
        (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
        torch.float16,
    ),
}
"""By name."""


def widened_scales(scale: Tensor) -> Tensor:
    """Stored scales in float32, exactly."""
    if scale.dtype != E8M0:
        return scale.to(torch.float32)
    exponents = scale.to(torch.int32)
    bits = (exponents << 23).masked_fill_(exponents == 0, 1 << 22)  # 2**-127 is subnormal
    return bits.masked_fill_(exponents == _NAN, 0x7FC00000).view(torch.float32)

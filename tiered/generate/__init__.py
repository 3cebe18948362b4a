"""From prompts to text: sequences, sampling, the generation loop, the report."""

from tiered.generate.loop import Generation, generate
from tiered.generate.report import Report, Surroundings, make_report
from tiered.generate.sampling import Sampler, SamplingParams
from tiered.generate.sequence import Sequence

__all__ = ["Generation", "Report", "Sampler", "SamplingParams", "Sequence", "Surroundings", "generate", "make_report"]

"""From prompts to text: sequences, sampling, the generation loop, the report."""

from tiered.generate.costs import Generation
from tiered.generate.figures import DeviceFigures, Figures
from tiered.generate.loop import generate
from tiered.generate.report import Report, ScoreReport, Surroundings, make_report, make_score_report
from tiered.generate.sampling import Sampler, SamplingParams
from tiered.generate.scheduler import Event, EventKind, Scheduler, Ticket
from tiered.generate.sequence import Sequence

__all__ = [
    "DeviceFigures",
    "Event",
    "EventKind",
    "Figures",
    "Generation",
    "Report",
    "Sampler",
    "SamplingParams",
    "Scheduler",
    "ScoreReport",
    "Sequence",
    "Surroundings",
    "Ticket",
    "generate",
    "make_report",
    "make_score_report",
]

"""Offline jobs: requests from a JSONL file, results appended to another, killed and started again at will."""

from tiered.jobs.identity import Identity, JobFile, job_path, store_fingerprint
from tiered.jobs.input import Input, scan_input
from tiered.jobs.journal import Journal
from tiered.jobs.progress import Progress
from tiered.jobs.prompts import PromptEncoder
from tiered.jobs.results import Label
from tiered.jobs.run import Generate, InputSize, Job, measure_input, run_job

__all__ = [
    "Generate",
    "Identity",
    "Input",
    "InputSize",
    "Job",
    "JobFile",
    "Journal",
    "Label",
    "Progress",
    "PromptEncoder",
    "job_path",
    "measure_input",
    "run_job",
    "scan_input",
    "store_fingerprint",
]

"""The search for settings."""

from .result import SweepResult as SweepResult
from .sweeping import sweep as sweep

"""The search for settings."""

from .result import SweepResult as SweepResult
from .space import find_optuna as find_optuna
from .sweeping import sweep as sweep

"""Two things measured in turn, pair by pair, in one process, so that a busy machine slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

LONG = 4
"""What takes so many times its reference gets fewer pairs: it is told from others by far more than they scatter."""


@dataclass(frozen=True)
class Ratio:
    """One thing against a reference; times in seconds.

    Attributes:
        wall: Median of the pairs' ratios of the time that passed.
        processor: The same of the time in which the process ran, all its threads together.
        seconds: Median of the time that the thing took.
        reference_seconds: That of the reference.
        pairs: How many were measured.
    """

    wall: float
    processor: float
    seconds: float
    reference_seconds: float
    pairs: int


def compare(run: Callable[[], object], reference: Callable[[], object], pairs: int, device: str = "cpu") -> Ratio:
    """Measure `run` against `reference`, after one pair that is not counted."""
    warm, warm_reference = _time(run, device), _time(reference, device)
    if warm[0] > LONG * warm_reference[0]:
        pairs = max(2, -(-pairs // LONG))
    ours, theirs = [], []
    for number in range(pairs):  # the first of a pair in turn, so that neither always follows the other
        order = [(run, ours), (reference, theirs)]
        for function, times in order if number % 2 else order[::-1]:
            times.append(_time(function, device))
    wall, processor = (
        statistics.median(own[clock] / other[clock] for own, other in zip(ours, theirs, strict=True))
        for clock in range(2)
    )
    seconds, reference_seconds = (statistics.median(wall for wall, _ in times) for times in (ours, theirs))
    return Ratio(wall, processor, seconds, reference_seconds, pairs)


def _time(run: Callable[[], object], device: str) -> tuple[float, float]:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - processor

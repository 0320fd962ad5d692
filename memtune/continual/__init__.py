"""Class-incremental learning: the protocol around any method, its folder, and its measures."""

from .protocol import ContinualTask as ContinualTask
from .protocol import class_order as class_order
from .protocol import fit_continual as fit_continual
from .protocol import split_by_class as split_by_class
from .result import ContinualResult as ContinualResult

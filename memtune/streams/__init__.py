"""Passes: of images through the untouched backbone, of task tokens beside it, and through an adapted view."""

from .following import Follower as Follower
from .passes import KeysValues as KeysValues
from .passes import Pass as Pass
from .passes import TrunkBlock as TrunkBlock
from .passes import extended as extended
from .stacking import Selection as Selection
from .stacking import Stack as Stack
from .stacking import fit_rows as fit_rows
from .stacking import per_task as per_task
from .streams import AdaptedStream as AdaptedStream
from .streams import TaskStream as TaskStream
from .streams import Trunk as Trunk

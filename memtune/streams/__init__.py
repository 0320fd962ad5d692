"""Passes: of images through the untouched backbone, of task tokens beside it, and through an adapted view."""

from .adapted_stream import AdaptedStream as AdaptedStream
from .attention import side_by_side as side_by_side
from .following import Follower as Follower
from .passes import Grid as Grid
from .passes import KeysValues as KeysValues
from .passes import KeyValueSource as KeyValueSource
from .passes import Pass as Pass
from .passes import TrunkBlock as TrunkBlock
from .passes import extended as extended
from .stacking import Selection as Selection
from .stacking import Stack as Stack
from .stacking import fit_rows as fit_rows
from .stacking import in_front as in_front
from .stacking import linear_per_task as linear_per_task
from .stacking import per_task as per_task
from .state_stream import StateStream as StateStream
from .stream import Stream as Stream
from .task_stream import TaskStream as TaskStream
from .trunk import Trunk as Trunk

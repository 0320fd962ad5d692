"""What others can do at each step of a training run (see `memtune.fit`)."""

from .training import SlimFit as SlimFit
from .training import TokenTune as TokenTune
from .training import TrainingCallback as TrainingCallback

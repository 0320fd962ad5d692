"""Training on Accelerate: the loop, its checkpoints, and what others do at each step."""

from .averaging import is_better_greater as is_better_greater
from .averaging import score_to_compare as score_to_compare
from .callbacks import TrainingCallback as TrainingCallback
from .closed_form import ClosedFormResult as ClosedFormResult
from .closed_form import FeatureSums as FeatureSums
from .closed_form import fit_closed_form as fit_closed_form
from .closed_form import read_features as read_features
from .closed_form import solve_head as solve_head
from .dynamic_freezing import SlimFit as SlimFit
from .fitting import check_objective as check_objective
from .fitting import fit as fit
from .learning_rate import LearningRateResult as LearningRateResult
from .learning_rate import find_learning_rate as find_learning_rate
from .result import TrainingResult as TrainingResult
from .run_settings import check_same_run as check_same_run
from .run_settings import describe_run as describe_run
from .token_selection import TokenTune as TokenTune

"""How right a model is."""

from .evaluating import MetricsFunction as MetricsFunction
from .evaluating import evaluate as evaluate
from .evaluating import measure as measure
from .evaluating import run_batch as run_batch
from .inspection import DataReport as DataReport
from .inspection import inspect_data as inspect_data
from .metrics import Accuracy as Accuracy
from .metrics import check_metrics as check_metrics
from .report import EvaluationReport as EvaluationReport

"""The models that users hold: a backbone with one task or with many."""

from .arithmetic import merge_adapters as merge_adapters
from .export import export_onnx as export_onnx
from .export import export_program as export_program
from .multitask import MixedOutput as MixedOutput
from .multitask import MultiTaskModel as MultiTaskModel
from .multitask import MultiTaskOutput as MultiTaskOutput
from .multitask import combine as combine
from .peft_folders import export_peft as export_peft
from .peft_folders import import_peft as import_peft
from .pipelines import pipeline as pipeline
from .prediction import Prediction as Prediction
from .prediction import Predictions as Predictions
from .prediction import TableWriter as TableWriter
from .prediction import TaskScores as TaskScores
from .prediction import caption as caption
from .prediction import lines_of as lines_of
from .tuned import TunedModel as TunedModel
from .tuned import load as load
from .wrapping import wrap as wrap

"""memtune: small trained adapters for one frozen Hugging Face vision model and many tasks."""

from .adapter import Adapter as Adapter
from .adapter import AdapterConfig as AdapterConfig
from .combine import combine as combine
from .errors import MemtuneError as MemtuneError
from .evaluation import evaluate as evaluate
from .explanation import explain as explain
from .methods import ApproximatedPromptConfig as ApproximatedPromptConfig
from .methods import CodaPromptConfig as CodaPromptConfig
from .methods import LoraConfig as LoraConfig
from .methods import MemoryConfig as MemoryConfig
from .multitask import MultiTaskModel as MultiTaskModel
from .pipeline import pipeline as pipeline
from .registry import register_method as register_method
from .sweep import sweep as sweep
from .training import fit as fit
from .training_config import TrainingConfig as TrainingConfig
from .tuned import TunedModel as TunedModel
from .tuned import load as load
from .wrap import wrap as wrap

__version__ = "0.1.0"

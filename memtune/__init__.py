"""memtune: small trained adapters for one frozen Hugging Face vision model and many tasks."""

from . import arithmetic as arithmetic
from . import callbacks as callbacks
from . import continual as continual
from . import export as export
from . import hub as hub
from . import peft_format as peft_format
from ._version import __version__ as __version__
from .errors import MemtuneError as MemtuneError
from .evaluation import evaluate as evaluate
from .explaining import explain as explain
from .methods import Adapter as Adapter
from .methods import AdapterConfig as AdapterConfig
from .methods import ApproximatedPromptConfig as ApproximatedPromptConfig
from .methods import CodaPromptConfig as CodaPromptConfig
from .methods import LoraConfig as LoraConfig
from .methods import MemoryConfig as MemoryConfig
from .methods import register_method as register_method
from .models import MultiTaskModel as MultiTaskModel
from .models import TunedModel as TunedModel
from .models import combine as combine
from .models import load as load
from .models import pipeline as pipeline
from .models import wrap as wrap
from .preparation import TrainingConfig as TrainingConfig
from .search import sweep as sweep
from .training import fit as fit

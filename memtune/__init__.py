"""memtune: small trained adapters for one frozen Hugging Face vision model and many tasks.

Its parts are imported when they are first asked for, so that the command line can answer without torch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .errors import MemtuneError as MemtuneError
from .moved import MovedModules

if TYPE_CHECKING:
    from . import arithmetic as arithmetic
    from . import callbacks as callbacks
    from . import continual as continual
    from . import export as export
    from . import hub as hub
    from . import peft_format as peft_format
    from .evaluation import evaluate as evaluate
    from .evaluation import inspect_data as inspect_data
    from .explaining import explain as explain
    from .methods import Adapter as Adapter
    from .methods import AdapterConfig as AdapterConfig
    from .methods import ApproximatedPromptConfig as ApproximatedPromptConfig
    from .methods import CodaPromptConfig as CodaPromptConfig
    from .methods import LoraConfig as LoraConfig
    from .methods import MemoryConfig as MemoryConfig
    from .methods import ScaleShiftConfig as ScaleShiftConfig
    from .methods import SideNetworkConfig as SideNetworkConfig
    from .methods import register_method as register_method
    from .models import MultiTaskModel as MultiTaskModel
    from .models import TunedModel as TunedModel
    from .models import combine as combine
    from .models import load as load
    from .models import pipeline as pipeline
    from .models import wrap as wrap
    from .preparation import TrainingConfig as TrainingConfig
    from .search import sweep as sweep
    from .tasks import RandomFeatures as RandomFeatures
    from .training import find_learning_rate as find_learning_rate
    from .training import fit as fit
    from .training import fit_closed_form as fit_closed_form

_NAMES = {
    "evaluation": ("evaluate", "inspect_data"),
    "explaining": ("explain",),
    "methods": (
        "Adapter",
        "AdapterConfig",
        "ApproximatedPromptConfig",
        "CodaPromptConfig",
        "LoraConfig",
        "MemoryConfig",
        "ScaleShiftConfig",
        "SideNetworkConfig",
        "register_method",
    ),
    "models": ("MultiTaskModel", "TunedModel", "combine", "load", "pipeline", "wrap"),
    "preparation": ("TrainingConfig",),
    "search": ("sweep",),
    "tasks": ("RandomFeatures",),
    "training": ("find_learning_rate", "fit", "fit_closed_form"),
}
_ROOM_OF = {name: room for room, names in _NAMES.items() for name in names}

sys.meta_path.append(MovedModules())

__all__ = [
    "Adapter",
    "AdapterConfig",
    "ApproximatedPromptConfig",
    "CodaPromptConfig",
    "LoraConfig",
    "MemoryConfig",
    "MemtuneError",
    "MultiTaskModel",
    "RandomFeatures",
    "ScaleShiftConfig",
    "SideNetworkConfig",
    "TrainingConfig",
    "TunedModel",
    "__version__",
    "arithmetic",
    "callbacks",
    "combine",
    "continual",
    "evaluate",
    "explain",
    "export",
    "find_learning_rate",
    "fit",
    "fit_closed_form",
    "hub",
    "inspect_data",
    "load",
    "peft_format",
    "pipeline",
    "register_method",
    "sweep",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        value = getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

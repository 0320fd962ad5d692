"""The methods that memtune brings, one file each, and what every method is made of."""

from .adapter import Adapter as Adapter
from .adapter import AdapterConfig as AdapterConfig
from .approximated_prompts import ApproximatedPromptAdapter as ApproximatedPromptAdapter
from .approximated_prompts import ApproximatedPromptConfig as ApproximatedPromptConfig
from .coda_prompts import CodaPromptAdapter as CodaPromptAdapter
from .coda_prompts import CodaPromptConfig as CodaPromptConfig
from .lora import LoraAdapter as LoraAdapter
from .lora import LoraConfig as LoraConfig
from .memory import MemoryAdapter as MemoryAdapter
from .memory import MemoryConfig as MemoryConfig
from .peft_names import locate as locate
from .registry import as_config as as_config
from .registry import create_adapter as create_adapter
from .registry import find_method as find_method
from .registry import method_names as method_names
from .registry import read_config as read_config
from .registry import register_method as register_method
from .scale_shift import ScaleShiftAdapter as ScaleShiftAdapter
from .scale_shift import ScaleShiftConfig as ScaleShiftConfig
from .side_network import SideNetworkAdapter as SideNetworkAdapter
from .side_network import SideNetworkConfig as SideNetworkConfig

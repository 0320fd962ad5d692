"""The methods that memtune brings: one file each, registered by being imported here."""

from .approximated_prompts import ApproximatedPromptAdapter as ApproximatedPromptAdapter
from .approximated_prompts import ApproximatedPromptConfig as ApproximatedPromptConfig
from .coda_prompts import CodaPromptAdapter as CodaPromptAdapter
from .coda_prompts import CodaPromptConfig as CodaPromptConfig
from .lora import LoraAdapter as LoraAdapter
from .lora import LoraConfig as LoraConfig
from .memory import MemoryAdapter as MemoryAdapter
from .memory import MemoryConfig as MemoryConfig

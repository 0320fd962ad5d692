"""The methods that memtune brings: one file each, registered by being imported here."""

from .lora import LoraAdapter as LoraAdapter
from .lora import LoraConfig as LoraConfig
from .memory import MemoryAdapter as MemoryAdapter
from .memory import MemoryConfig as MemoryConfig

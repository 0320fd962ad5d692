"""The methods that memtune brings: one file each, registered by being imported here."""

from .memory import MemoryAdapter as MemoryAdapter
from .memory import MemoryConfig as MemoryConfig

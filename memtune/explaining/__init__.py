"""What a model looks at."""

from .explanation import Explanation as Explanation
from .explanation import MemoryUsage as MemoryUsage
from .explanation import explain as explain
from .explanation import memory_usage as memory_usage

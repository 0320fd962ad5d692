"""Several LoRA adapters merged into one."""

from .models import merge_adapters as merge_adapters

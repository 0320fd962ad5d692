"""PEFT's own folder format for LoRA."""

from .models import export_peft as export_peft
from .models import import_peft as import_peft

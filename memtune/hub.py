"""Adapters on the Hugging Face Hub."""

from .storage import list_adapters as list_adapters

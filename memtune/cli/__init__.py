"""The command line."""

from .finetuning import add_arguments as add_arguments
from .finetuning import load_data as load_data
from .parser import main as main

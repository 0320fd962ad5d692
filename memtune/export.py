"""Models as graphs of torch.export and ONNX."""

from .models import export_onnx as export_onnx
from .models import export_program as export_program

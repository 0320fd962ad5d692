"""The README.md of an adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_CARD = """\
---
library_name: memtune
pipeline_tag: image-classification
{base_model}tags:
- memtune
{tags}---

# {title}

A memtune adapter ({methods}, {mode}) for a frozen {family} backbone: {parameters:,} trained values, {classes} classes.

```python
import memtune

model = memtune.load("{folder}")  # or backbone=..., a model that is loaded already
```

Classes: {labels}.
"""


def write_card(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The card of an adapter, from its configuration file and its tensors. No path of this machine stands in it."""
    methods = [method["method"] for method in config["methods"]]
    name = config["backbone"]["name_or_path"]
    public = bool(name) and not Path(name).exists() and not Path(name).is_absolute()
    labels = config["labels"]
    return _CARD.format(
        base_model=f"base_model: {name}\nbase_model_relation: adapter\n" if public else "",
        tags="".join(f"- {method}\n" for method in methods),
        title=" + ".join(methods) + " adapter" + (f" for {name}" if public else ""),
        methods=" + ".join(methods),
        mode="masked" if config["masked"] else "unmasked",
        family=config["backbone"]["family"],
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        classes=len(labels),
        labels=", ".join(labels),
        folder="path/to/this/folder",
    )

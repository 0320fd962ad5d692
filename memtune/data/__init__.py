"""From images and labels to batches."""

from .augmentation import Augmentation as Augmentation
from .augmentation import Mixing as Mixing
from .augmentation import mixing as mixing
from .images import Collator as Collator
from .images import ImageDataset as ImageDataset
from .images import as_items as as_items

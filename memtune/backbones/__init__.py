"""Frozen Hugging Face vision models as blocks and roles, and views of them."""

from .backbone import Backbone as Backbone
from .backbone import Block as Block
from .backbone import as_pretrained as as_pretrained
from .families import TOWERS as TOWERS
from .family import HEAD_NAME as HEAD_NAME
from .fingerprints import fingerprint as fingerprint
from .fingerprints import head_fingerprint as head_fingerprint
from .fingerprints import same_weights as same_weights
from .fingerprints import stored_parts as stored_parts
from .freezing import Hold as Hold
from .fused import LinearPart as LinearPart
from .views import HookWatch as HookWatch
from .views import shadow as shadow
from .views import shadow_config as shadow_config
from .views import structure as structure

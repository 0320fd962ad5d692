"""What a run stands on: its settings, accelerator, loaders, and how parameters are sharded."""

from .arguments import add_training_arguments as add_training_arguments
from .arguments import read_training_arguments as read_training_arguments
from .config import RECIPES as RECIPES
from .config import TrainingConfig as TrainingConfig
from .distribution import average_gradients as average_gradients
from .distribution import is_sharding as is_sharding
from .distribution import shard as shard
from .distribution import sharded as sharded
from .distribution import whole as whole
from .loaders import borrowed_state as borrowed_state
from .loaders import check_folders as check_folders
from .loaders import check_items as check_items
from .loaders import make_accelerator as make_accelerator
from .loaders import make_augmentation as make_augmentation
from .loaders import make_items as make_items
from .loaders import make_loader as make_loader
from .loaders import make_mixing as make_mixing
from .loaders import release as release

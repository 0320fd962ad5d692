"""What the trunk makes of images, kept on disk."""

from .filling import CacheSettings as CacheSettings
from .filling import cached_dataset as cached_dataset
from .filling import check_cacheable as check_cacheable
from .store import DTYPES as DTYPES
from .store import CacheType as CacheType
from .store import TrunkCache as TrunkCache
from .store import digest_of as digest_of
from .store import to_pass as to_pass
from .upkeep import CacheFolder as CacheFolder
from .upkeep import find_damaged as find_damaged
from .upkeep import list_folders as list_folders
from .upkeep import prune as prune

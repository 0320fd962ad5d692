"""Folders and the Hub: adapters and collections of them as data, written at once, read with every doubt named."""

from .adapter_folder import FORMAT_VERSION as FORMAT_VERSION
from .adapter_folder import check_backbone as check_backbone
from .adapter_folder import make_task as make_task
from .adapter_folder import read_folder as read_folder
from .adapter_folder import write_folder as write_folder
from .atomic import current as current
from .atomic import publish_folder as publish_folder
from .atomic import remove_folder as remove_folder
from .atomic import replace_files as replace_files
from .card import CardDetails as CardDetails
from .card import public_name as public_name
from .collection import read_index as read_index
from .collection import write_collection as write_collection
from .decoding import decode as decode
from .hub import find_collection as find_collection
from .hub import find_folder as find_folder
from .hub import list_adapters as list_adapters
from .hub import load_recorded_backbone as load_recorded_backbone
from .hub import make_repository as make_repository
from .hub import push_folder as push_folder
from .peft_folder import PEFT_CONFIG_NAME as PEFT_CONFIG_NAME
from .peft_folder import PEFT_PREFIX as PEFT_PREFIX
from .peft_folder import PEFT_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from .peft_folder import write_peft_folder as write_peft_folder
from .processors import sized as sized

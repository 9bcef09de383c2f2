from . import digits as digits
from . import page_cache as page_cache
from . import pipeline as pipeline
from . import shard as shard
from . import volumes as volumes
from .shard import Shard as Shard

from . import digits as digits
from . import pipeline as pipeline
from . import shard as shard
from . import volumes as volumes
from .shard import Shard as Shard

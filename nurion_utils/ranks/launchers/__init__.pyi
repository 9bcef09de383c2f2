from . import elastic as elastic
from . import nodes as nodes
from .guarded import Guarded as Guarded

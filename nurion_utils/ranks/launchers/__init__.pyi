from . import elastic as elastic
from . import nodes as nodes

from . import elastic as elastic
from . import lab as lab

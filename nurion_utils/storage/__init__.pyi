from . import cases as cases
from . import draw as draw
from .emulate import EmulatedFileSystem as EmulatedFileSystem
from .model import ParallelFileSystem as ParallelFileSystem
from .model import Workload as Workload
from .simulation import simulate as simulate
from .simulation import summarise as summarise

from . import pbs as pbs
from . import slurm as slurm
from .commands import SchedulerError as SchedulerError
from .commands import State as State

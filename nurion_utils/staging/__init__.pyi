from . import plans as plans
from .plans import StageError as StageError
from .plans import StagePlan as StagePlan
from .stager import plan as plan
from .stager import purge as purge
from .stager import stage as stage

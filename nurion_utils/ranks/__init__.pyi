from . import launchers as launchers
from .engine import rank_environment as rank_environment
from .failures import RankError as RankError
from .notebook import progress as progress
from .world import World as World
from .world import start as start

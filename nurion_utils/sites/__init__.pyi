from .model import BurstBuffer as BurstBuffer
from .model import Node as Node
from .model import Site as Site
from .model import SiteError as SiteError
from .reading import DIRECTORY as DIRECTORY
from .reading import load as load
from .reading import names as names
from .reading import read as read

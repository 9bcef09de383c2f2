from . import draw as draw
from .file import read as read
from .overlap import steps as steps

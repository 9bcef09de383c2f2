from .burst_buffers import BurstBufferError as BurstBufferError
from .burst_buffers import guard as guard
from .job import Job as Job
from .job import Notebook as Notebook
from .linting import lint as lint
from .writing import explain as explain
from .writing import script as script

from . import burst_buffers as burst_buffers
from .burst_buffers import BackEndError as BackEndError
from .burst_buffers import Ime as Ime
from .burst_buffers import guard as guard
from .burst_buffers import job_script as job_script

from .burst_buffers import BurstBufferError as BurstBufferError
from .burst_buffers import guard as guard
from .script import job_script as job_script

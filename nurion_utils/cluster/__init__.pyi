from .slurm import Cluster as Cluster
from .slurm import ClusterError as ClusterError

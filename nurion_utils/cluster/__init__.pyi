from .slurm import Cluster as Cluster

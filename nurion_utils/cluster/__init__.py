"""A little cluster on one machine: virtual nodes, on which a real Slurm runs jobs.

>>> from nurion_utils.cluster import Cluster
>>> with Cluster(nodes=4) as cluster:  # doctest: +SKIP
...     print(cluster.run(["srun", "-N4", "hostname"]).stdout)

``python -m nurion_utils.cluster --nodes 4`` opens a shell on it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

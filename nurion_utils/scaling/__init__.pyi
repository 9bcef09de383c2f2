from .calibrating import Calibration as Calibration
from .calibrating import calibrate as calibrate
from .comparing import fidelity as fidelity
from .comparing import score as score
from .predicting import predict as predict
from .workloads import PUBLISHED as PUBLISHED
from .workloads import Workload as Workload

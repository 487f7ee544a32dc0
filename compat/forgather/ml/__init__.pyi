from forgather.ml.distributed import DistributedEnvironment as DistributedEnvironment
from forgather.ml.trainer import *  # noqa: F403 - all of them, which are written there

"""What scripts import from the cookbook. Importing this package loads neither torch nor an SDK."""

from training.utils.checkpoints import Checkpoint, Checkpointer, CheckpointLog, load_state
from training.utils.client import ReconnectableClient
from training.utils.config import (
    DeployConfig,
    InfraConfig,
    OptimConfig,
    RunConfig,
    TrainerConfig,
    WandBConfig,
    WeightSyncConfig,
    validate,
)
from training.utils.errors import (
    CheckpointError,
    ConfigError,
    CookbookError,
    DataError,
    MismatchError,
    PlatformError,
    ReconnectedError,
)
from training.utils.provision import Workspace
from training.utils.rl.config import PolicyConfig, RolloutConfig

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointLog",
    "Checkpointer",
    "ConfigError",
    "CookbookError",
    "DataError",
    "DeployConfig",
    "InfraConfig",
    "MismatchError",
    "OptimConfig",
    "PlatformError",
    "PolicyConfig",
    "ReconnectableClient",
    "ReconnectedError",
    "RolloutConfig",
    "RunConfig",
    "TrainerConfig",
    "WandBConfig",
    "WeightSyncConfig",
    "Workspace",
    "load_state",
    "validate",
]

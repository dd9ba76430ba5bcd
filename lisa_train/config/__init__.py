"""Every setting of a training run: frozen dataclasses, the same from YAML, shell and notebook.

No torch here: `lisa-train --help` and `--print_config` must not wait for it.
"""

from lisa_train.config.lisa import ALWAYS_ACTIVE_GROUPS, LisaConfig, OptimizerState
from lisa_train.config.record import OF_TRAINING, QUANTITIES, RecordConfig
from lisa_train.config.train import Method, TrainConfig, check_eight_bit_states

__all__ = [
    "ALWAYS_ACTIVE_GROUPS",
    "OF_TRAINING",
    "QUANTITIES",
    "LisaConfig",
    "Method",
    "OptimizerState",
    "RecordConfig",
    "TrainConfig",
    "check_eight_bit_states",
]

"""Every setting of a training run: frozen dataclasses, the same from YAML, shell and notebook.

No torch here: `lisa-train --help` and `--print_config` must not wait for it.
"""

from typing import TYPE_CHECKING, Any

from lisa_train.command.probe import ProbeConfig
from lisa_train.measure.config import OF_TRAINING, QUANTITIES, RecordConfig
from lisa_train.methods import Method
from lisa_train.methods.lisa.config import ALWAYS_ACTIVE_GROUPS, LisaConfig, OptimizerState
from lisa_train.methods.lisa.learning.config import LearnConfig
from lisa_train.methods.select.config import SelectConfig
from lisa_train.optim.settings import check_eight_bit_states

if TYPE_CHECKING:
    from lisa_train.command.config import TrainConfig as TrainConfig

__all__ = [
    "ALWAYS_ACTIVE_GROUPS",
    "OF_TRAINING",
    "QUANTITIES",
    "LearnConfig",
    "LisaConfig",
    "Method",
    "OptimizerState",
    "ProbeConfig",
    "RecordConfig",
    "SelectConfig",
    "TrainConfig",
    "check_eight_bit_states",
]


def __getattr__(name: str) -> Any:
    """Load `TrainConfig` when it is first used: methods bring settings until then."""
    if name == "TrainConfig":
        from lisa_train.command.config import TrainConfig

        return TrainConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Accelerate's FSDP2 on a CPU: it sets it up on accelerators only, and is told that this is one."""

from contextlib import contextmanager
from unittest import mock

from accelerate import state
from accelerate.utils import DistributedType


@contextmanager
def fsdp2_on_a_cpu():
    """Have accelerate split models in processes without accelerators, by its own code.

    All that is changed is its decision, which `AcceleratorState` makes by the kind of device.
    """
    original = state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(state.AcceleratorState, "__init__", init):
        yield

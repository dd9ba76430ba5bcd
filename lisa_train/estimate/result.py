"""The answer of an estimate: bytes per device and part; no torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from lisa_train.estimate.setting import Setting

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")
# What no shape tells: the CUDA context with the libraries' workspaces, and what the caching
# allocator loses to rounding and fragmentation on what comes and goes. Assumed, not measured.
CONTEXT_BYTES = 600_000_000
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device.

    Attributes
    ----------
    weights
        Parameters and buffers.
    gradients
        Gradients that stand at once.
    optimizer
        Optimizer state.
    activations
        What the layers save for backward, at the end of the forward pass.
    logits
        Most bytes that the final norm, the head and the loss hold at once.
    phases
        Peak of the forward pass, of the backward pass and of the optimizer step. The parts do
        not peak together, so that the peak is less than their sum.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Most bytes that are allocated at once."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """``forward``, ``backward`` or ``step``: where the peak is."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def allowance(self) -> int:
        """Bytes to add for what the estimate leaves out."""
        return CONTEXT_BYTES + int(FRAGMENTATION * (self.peak - self.weights - self.optimizer))


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of a training step.

    Attributes
    ----------
    model
        Class of the model.
    setting
        What was asked.
    parameters, trainable
        Numbers of parameters: of the model, and of those that train at once.
    devices
        Bytes on every device.
    mean
        Peak of the fullest device in the mean over LISA's draws; `total` where nothing is drawn.
    host
        Bytes of optimizer state in host memory, or that move there when the device is full.
    paged
        Those of them that move: managed memory. It lies on the device while there is room; that
        the driver moves it as it should has not been measured.
    active_layers
        LISA's layers that were taken to train: those that cost the most, unless they were given.
    """

    model: str
    setting: Setting
    parameters: int
    trainable: int
    devices: tuple[DeviceMemory, ...]
    mean: int
    host: int = 0
    paged: int = 0
    active_layers: tuple[int, ...] = field(default=())

    @property
    def fullest(self) -> DeviceMemory:
        """The device with the highest peak."""
        return max(self.devices, key=lambda device: device.peak)

    @property
    def total(self) -> int:
        """Peak bytes of the fullest device, without the allowance."""
        return self.fullest.peak

    def needs(self) -> int:
        """Bytes that a card must have: the peak and the allowance."""
        return max(device.peak + device.allowance for device in self.devices)

    def fits(self, memory: int) -> bool:
        """Whether every device fits on a card of `memory` bytes, allowance included.

        Paged state is taken to lie in host memory: see `fits_unpaged`.
        """
        return self.needs() <= memory

    def fits_unpaged(self, memory: int) -> bool:
        """Whether it fits with all of the paged state on the device too."""
        return self.fits(memory - self.paged)

    def to_frame(self) -> "pd.DataFrame":
        """One row per device, in bytes."""
        import pandas as pd

        rows = [
            {
                "device": i,
                **{part: getattr(device, part) for part in PARTS},
                **{f"{phase}_peak": size for phase, size in device.phases.items()},
                "total": device.peak,
                "allowance": device.allowance,
            }
            for i, device in enumerate(self.devices)
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        device = self.fullest
        parts = ", ".join(f"{part} {getattr(device, part) / 1e9:.2f}" for part in PARTS)
        several = f" on the fullest of {len(self.devices)} devices" if len(self.devices) > 1 else ""
        phase = device.peak_phase
        when = "optimizer step" if phase == "step" else f"{phase} pass"
        return (
            f"{self.model}, {self.setting.method}: {self.total / 1e9:.2f} GB{several} "
            f"in the {when} (GB: {parts})"
        )

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        table = (frame.drop(columns="device") / 1e9).round(2).to_html(border=0)
        return f"<p>{escape(repr(self))}</p>{table}<p>GB per device, 1 GB = 10⁹ bytes</p>"

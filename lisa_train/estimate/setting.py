"""What an estimate is asked for: one frozen dataclass, checked; no torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from lisa_analysis.contract.errors import ConfigError
from lisa_train.checks import one_of, whole
from lisa_train.methods import METHODS, sections
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.select.config import SelectConfig
from lisa_train.optim.settings import check_eight_bit_states

DType = Literal["auto", "float32", "bfloat16", "float16"]
Autocast = Literal["bfloat16", "float16"]
Attention = Literal["sdpa", "eager"]
Spread = Literal["fsdp", "layers"]

if TYPE_CHECKING:

    class _Sections: ...
else:
    _Sections = sections()


@dataclass(frozen=True)
class Setting(_Sections):
    """How a model is trained, as far as memory depends on it; see `estimate_memory`."""

    method: str = "lisa"
    batch_size: int = 1
    sequence_length: int = 1024
    dtype: DType = "auto"
    autocast: Autocast | None = None
    attn_implementation: Attention = "sdpa"
    optim: str = "adamw_torch_fused"
    eight_bit_states: tuple[str, ...] | None = None
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    chunked_loss: bool = False
    step_in_backward: bool = False
    lisa: LisaConfig = field(default_factory=LisaConfig)
    lora: Mapping[str, Any] = field(default_factory=dict)
    peft: Mapping[str, Any] = field(default_factory=dict)
    select: SelectConfig = field(default_factory=SelectConfig)
    autocast_adapter_dtype: bool = True
    active_layers: tuple[int, ...] | None = None
    devices: int = 1
    spread: Spread = "fsdp"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", tuple(METHODS)),
            ("dtype", get_args(DType)),
            ("attn_implementation", get_args(Attention)),
            ("spread", get_args(Spread)),
        ):
            one_of(name, getattr(self, name), allowed)
        if self.autocast is not None:
            one_of("autocast", self.autocast, get_args(Autocast))
        for name in ("batch_size", "sequence_length", "gradient_accumulation_steps", "devices"):
            object.__setattr__(self, name, whole(name, getattr(self, name), " of at least 1", 1))
        if self.step_in_backward and self.gradient_accumulation_steps > 1:
            raise ConfigError(
                f"step_in_backward frees every gradient at once, but gradient_accumulation_steps "
                f"is {self.gradient_accumulation_steps}; set it to 1."
            )
        if self.eight_bit_states is not None:
            check_eight_bit_states(self.eight_bit_states, self.optim)
        if self.active_layers is not None:
            if self.rotation is None:
                raise ConfigError(
                    f"active_layers is set but method is {self.method!r}; it is LISA's."
                )
            object.__setattr__(self, "active_layers", tuple(sorted(set(self.active_layers))))
        METHODS[self.method].check_estimate(self)

    @property
    def rotation(self) -> LisaConfig | None:
        """Settings by which layers take turns; None where the same tensors train at every step."""
        return METHODS[self.method].rotation(self)

"""What is measured: every method, and every option by itself on LISA E+H+2L."""

from dataclasses import dataclass, replace
from typing import Any

from lisa_train.config import LisaConfig
from lisa_train.estimate.setting import Setting

# Fused AdamW is what Trainer takes by itself; bf16 weights and bf16 arithmetic throughout.
_BASE = Setting(method="full", dtype="bfloat16", optim="adamw_torch_fused")
_LISA = replace(_BASE, method="lisa", lisa=LisaConfig(2, seed=0))
_NOTHING_ALWAYS = LisaConfig(2, seed=0, always_active=())
_ALL_GROUPS = ("layers", "embed", "head", "norm")
_SAVING: dict[str, Any] = {
    "gradient_checkpointing": True, "chunked_loss": True, "step_in_backward": True,
}  # fmt: skip
_EIGHT_BIT: dict[str, Any] = {"optim": "adamw_bnb_8bit", "eight_bit_states": _ALL_GROUPS}
_PAGED: dict[str, Any] = {"optim": "paged_adamw_8bit", "eight_bit_states": _ALL_GROUPS}


@dataclass(frozen=True)
class Case:
    """A row of the table: a method or an option, and whether it belongs to the short list."""

    name: str
    setting: Setting
    method: bool = False


def cases(batch_size: int, sequence_length: int) -> list[Case]:
    """Return all cases for one size of batch."""
    lora = replace(_BASE, method="lora", lora={"r": 16})
    rows = [
        Case("full", _BASE, True),
        Case("LoRA r=16", lora, True),
        Case("LoRA r=128", replace(_BASE, method="lora", lora={"r": 128}), True),
        Case("LISA E+H", replace(_LISA, active_layers=()), True),
        Case("LISA E+H+2L", _LISA, True),
        Case("LISA E+H+4L", replace(_LISA, lisa=LisaConfig(4, seed=0)), True),
        Case("LISA 2L, no E, H, norm", replace(_LISA, lisa=_NOTHING_ALWAYS)),
        Case("… gradient checkpointing", replace(_LISA, gradient_checkpointing=True)),
        Case("… step in backward", replace(_LISA, step_in_backward=True)),
        Case("… chunked loss", replace(_LISA, chunked_loss=True)),
        Case("… foreach AdamW", replace(_LISA, optim="adamw_torch")),
        Case("… 8-bit state, embeddings 32-bit", replace(_LISA, optim="adamw_bnb_8bit")),
        Case(
            "… 8-bit state throughout",
            replace(_LISA, **_EIGHT_BIT),
        ),
        Case("… paged 8-bit state", replace(_LISA, optim="paged_adamw_8bit")),
        Case("… eager attention", replace(_LISA, attn_implementation="eager")),
        Case(
            "… active layers in fp32",
            replace(_LISA, lisa=LisaConfig(2, seed=0, precision="fp32_active")),
        ),
        Case(
            "LISA E+H+2L, chunked loss, 8-bit state throughout",
            replace(_LISA, chunked_loss=True, **_EIGHT_BIT),
        ),
        Case("LISA E+H+2L, all that saves", replace(_LISA, **_SAVING, **_EIGHT_BIT)),
        Case("LISA 2L, all that saves", replace(_LISA, lisa=_NOTHING_ALWAYS, **_SAVING)),
        Case(
            "LISA 2L, all that saves, 8-bit state",
            replace(_LISA, lisa=_NOTHING_ALWAYS, **_SAVING, **_EIGHT_BIT),
        ),
        Case(
            "LISA 2L, all that saves, paged 8-bit state",
            replace(_LISA, lisa=_NOTHING_ALWAYS, **_SAVING, **_PAGED),
        ),
        Case("LoRA r=16, chunked loss", replace(lora, chunked_loss=True)),
        Case("LoRA r=16, gradient checkpointing", replace(lora, gradient_checkpointing=True)),
        Case(
            "LoRA r=16, all that saves",
            replace(lora, **_SAVING),
        ),
    ]  # fmt: skip
    return [
        replace(
            row,
            setting=replace(row.setting, batch_size=batch_size, sequence_length=sequence_length),
        )
        for row in rows
    ]

"""Gradients without training: of independent batches, and of all layers while a run goes on."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lisa_train.measure.probe.probing import probe as probe


def __getattr__(name: str) -> Any:
    if name == "probe":
        from lisa_train.measure.probe.probing import probe

        return probe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

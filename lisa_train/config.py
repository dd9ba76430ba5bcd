"""Every setting of a training run: frozen dataclasses, the same from YAML, shell and notebook.

No torch here: `lisa-train --help` and `--print_config` must not wait for it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from lisa_analysis.errors import ConfigError

ALWAYS_ACTIVE_GROUPS = ("embed", "head", "norm")
Sampling = Literal[
    "uniform", "bernoulli", "cyclic", "systematic", "conditional_poisson", "balanced"
]
OptimizerState = Literal["reset", "keep", "offload"]


@dataclass(frozen=True)
class LisaConfig:
    """Which layers train, and for how long (LISA, arXiv 2403.17919, Algorithm 1).

    Parameters
    ----------
    activated_layers
        Number of layers k that train in each interval (γ in the paper); with
        `sampling="bernoulli"` the expected number.
    interval_steps
        Optimizer steps K between two draws.
    sampling
        How the layers of an interval are drawn.
    probabilities
        Path of a `probabilities.json` file, or a sequence of inclusion probabilities π, one per
        layer, Σπ = k. None means equal probabilities k/L.
    always_active
        Groups that train in every interval: any of ``embed``, ``head``, ``norm``.
    optimizer_state
        What happens to the optimizer state of a layer that is frozen again: ``reset`` frees it,
        ``keep`` leaves it, ``offload`` moves it to host memory until the layer returns.
    seed
        Seed of the layer schedule; None takes the training seed.
    """

    activated_layers: int = 2
    interval_steps: int = 20
    sampling: Sampling = "uniform"
    probabilities: str | tuple[float, ...] | None = None
    always_active: tuple[str, ...] = ALWAYS_ACTIVE_GROUPS
    optimizer_state: OptimizerState = "reset"
    seed: int | None = None


@dataclass(frozen=True)
class RecordConfig:
    """What a run writes into its run directory, and how often.

    Parameters
    ----------
    run_dir
        The run directory. `lisa-train` fills in its `output_dir`.
    every
        Record the norms of every n-th optimizer step (and of the first).
    """

    run_dir: str | None = None
    every: int = 10

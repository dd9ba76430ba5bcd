"""Learning-rate multipliers by layer: the file that the analysis writes and training reads.

    {"schema": "lr-multipliers/1", "layer_names": ["model.layers.0", …],
     "multipliers": {"0": 1.3, …, "embed": 1.0, "head": 1.0, "norm": 1.0, "other": 1.0},
     "provenance": {…}}

`layer_names` and the groups may be missing, and so may all the layers: `{"head": 30}` alone is of
any model. What is missing has the multiplier 1.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.json_file import read_object

SCHEMA = "lr-multipliers/1"
GROUPS = ("embed", "head", "norm", "other")


@dataclass(frozen=True)
class Multipliers:
    """Factors on the learning rate.

    Attributes
    ----------
    layers
        One per layer, in the order of the model's layers; empty where all have 1.
    groups
        Of embed, head, norm and other.
    layer_names
        Names of the layers that they were made for, empty where the file does not say.
    """

    layers: tuple[float, ...]
    groups: dict[str, float]
    layer_names: tuple[str, ...]

    def factor(self, layer: int | None, group: str) -> float:
        """Return that of a tensor of a layer, or of a group where it is in none."""
        if layer is None:
            return self.groups.get(group, 1.0)
        return self.layers[layer] if self.layers else 1.0


def read_multipliers(path: str | Path) -> Multipliers:
    """Read and check a file of multipliers.

    Raises
    ------
    ConfigError
        One sentence, when the file is missing, torn, of another schema, or holds what is no
        multiplier: every one is a finite number of at least 0, for the layers 0 … L−1 without a
        gap, or for groups alone.
    """
    path = Path(path)
    record = read_object(path, ConfigError, "lisa-analyze --export lr:FILE")
    given = record.get("multipliers")
    if record.get("schema") != SCHEMA or not isinstance(given, dict):
        raise ConfigError(
            f"{path} has the schema {record.get('schema')!r}, expected {SCHEMA!r} with an object "
            "'multipliers': write it with lisa-analyze --export lr:FILE."
        )
    layers: dict[int, float] = {}
    groups = dict.fromkeys(GROUPS, 1.0)
    for key, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value >= 0):
            raise ConfigError(
                f"{path} has the multiplier {value!r} for {key!r}: expected a number of at least 0."
            )
        if key in GROUPS:
            groups[key] = float(value)
        elif key.isdecimal():
            layers[int(key)] = float(value)
        else:
            raise ConfigError(
                f"{path} has a multiplier for {key!r}: expected the index of a layer or one of "
                f"{', '.join(GROUPS)}."
            )
    if not given or sorted(layers) != list(range(len(layers))):
        raise ConfigError(
            f"{path} has multipliers for {len(layers)} layers: expected all from 0 on, without a "
            "gap."
        )
    names = record.get("layer_names") or []
    if not isinstance(names, list) or (names and len(names) != len(layers)):
        raise ConfigError(f"{path} has {len(layers)} multipliers of layers and other layer_names.")
    return Multipliers(tuple(layers[i] for i in range(len(layers))), groups, tuple(map(str, names)))

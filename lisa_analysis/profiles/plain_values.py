"""numpy and pandas values as those of JSON."""

from typing import Any

import numpy as np
import pandas as pd


def to_plain(value: Any) -> Any:
    """Recursively turn numpy and pandas values into JSON values; non-finite numbers are None."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, np.generic):
        return to_plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if value is pd.NA or value is pd.NaT:
        return None
    return value

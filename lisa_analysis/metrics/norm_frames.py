"""One measured quantity of a run as a frame of steps and layers, for whoever looks by hand."""

from os import PathLike
from typing import TYPE_CHECKING

from lisa_analysis.contract.errors import LisaError, suggest
from lisa_analysis.metrics.step_tables import step_table
from lisa_analysis.rundir.opening import opened

if TYPE_CHECKING:
    import pandas as pd

    from lisa_analysis.rundir.run import Run


def norms(
    run: "Run | str | PathLike[str]", column: str = "grad_norm", *, by: str = "layer"
) -> "pd.DataFrame":
    """Return one measured column per optimizer step and layer.

    Parameters
    ----------
    run
        A run directory opened with `load`, or its path.
    column
        A column of `lisa_analysis.contract.schema.METRICS_TABLE` that the run recorded, as
        ``grad_norm``, ``update_norm`` or ``weight_norm``.
    by
        ``layer``, ``kind`` (attn.q … mlp.down over the whole stack), ``module`` (a kind within
        a layer) or ``tensor``.

    Returns
    -------
    DataFrame
        float32, rows ``step``; columns are layers by their index (everything else by its name),
        then what is outside the stack (``embed``, ``head``, ``norm``). The tensors of a group are
        added up as the column says: norms as the root of their summed squares. NaN where a group
        did not train at that step, inf where something measured was not finite.

    Raises
    ------
    LisaError
        For what is no run, a column that was not recorded, or an unknown `by`.
    """
    table = step_table(opened(run, "norms"), by)
    if not isinstance(column, str) or column not in table:
        recorded = list(table.measures)
        raise LisaError(
            f"norms takes one recorded column, got {column!r}: the run recorded "
            f"{', '.join(recorded) or 'nothing of a training step'}."
            f"{suggest(str(column), recorded)}"
        )
    return table.to_frame(column).copy()  # the table is remembered; the frame is the caller's

"""Two processes record what one does, with one collective per recorded step."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lisa_analysis.rundir import load

pytestmark = pytest.mark.slow


def launch(script, mode, folder, world):
    here = Path(__file__).parent
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here.parent}",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(here / script), mode, str(folder), str(rank), str(world)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(outputs)[-4000:]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_record_what_one_does(tmp_path, mode):
    launch("distributed_worker.py", "single", tmp_path, 1)
    launch("distributed_worker.py", mode, tmp_path, 2)
    one, two = load(tmp_path / "single"), load(tmp_path / mode)
    assert two.status == "finished"
    name = ["step", "name"]
    a, b = (
        run.metrics().merge(run.parameters[["param_id", "name"]], on="param_id").set_index(name)
        for run in (one, two)
    )
    assert set(a.index) == set(b.index)
    b = b.loc[a.index]
    for column in ("weight_norm", "grad_norm", "grad_norm_l1", "update_norm", "opt_steps"):
        assert np.allclose(a[column], b[column], rtol=1e-4, equal_nan=True), column
    assert np.allclose(one.scalars["loss"], two.scalars["loss"], rtol=1e-5)
    assert one.scalars["tokens"].tolist() == two.scalars["tokens"].tolist()

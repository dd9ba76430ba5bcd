"""What a run trained is told from its tensors, whatever its method is called."""

import json

import numpy as np
import pytest

import lisa_analysis as la
from lisa_analysis.contract.schema import MANIFEST
from lisa_analysis.rundir.trained import has_adapters, has_low_rank


@pytest.mark.parametrize(("method", "adapters"), [("full", False), ("lisa", False), ("lora", True)])
def test_adapters_are_seen_by_their_tensors(make_run, method, adapters):
    run = make_run(steps=20, method=method)
    assert has_adapters(run) is has_low_rank(run) is adapters


def test_the_name_of_the_method_decides_nothing(make_run):
    """Adapters trained by a trainer that calls its method otherwise start as they are drawn."""
    run = make_run(steps=20, method="lora")
    record = json.loads((run.path / MANIFEST).read_text("utf-8"))
    (run.path / MANIFEST).write_text(json.dumps(record | {"method": "of my own"}), "utf-8")
    other = la.load(run.path)
    named, unnamed = (la.importance(r, "weight_norm").initialisation for r in (run, other))
    assert unnamed.statement == named.statement
    assert np.isfinite(unnamed.expected).all()

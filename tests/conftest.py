"""Settings shared by all tests: offline, few threads, no display."""

import gc
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
# A bug inside the recorder fails the test instead of becoming a warning.
os.environ["LISA_TOOLKIT_STRICT"] = "1"
# Two workers on two cores: one thread each, and sums that do not depend on the thread count.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a CUDA device where there is none, and say so.

    `helpers_processes` asks for the test's markers, and there is no other way to know them there.
    """
    os.environ["TEST_MARKERS"] = " ".join(marker.name for marker in item.iter_markers())
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="module", autouse=True)
def _garbage_is_sought_among_what_this_file_makes() -> None:
    """Take all that lives already out of the garbage collector's sight.

    `Trainer` ends each training with `gc.collect()`, which would walk the million objects of torch,
    transformers and pytest every time: more than half of the time of a file of short trainings.
    """
    gc.collect()
    gc.freeze()

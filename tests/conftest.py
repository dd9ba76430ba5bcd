"""Settings shared by all tests: offline, few threads, no display."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
# Two workers on two cores: one thread each, and sums that do not depend on the thread count.
os.environ.setdefault("OMP_NUM_THREADS", "1")

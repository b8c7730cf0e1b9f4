import gc
import os

import pytest


# Small tensors: threads cost more than they bring, and every rank of a launched test inherits these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def collect_new_objects_only():
    """`Trainer` collects garbage in each run, which is slow over all that the imported modules hold."""
    gc.collect()
    gc.freeze()

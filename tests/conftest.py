"""Read by pytest before any test.

One thread, since operations of this size are slower with two. Where there are more (test_splat.py), those that wait
sleep: torch and Numba each have a pool of OpenMP threads, and by default a thread that waits spins and takes the other
pool's time.

Tests see no GPU, whether there is one or not: what they compare is what a CPU computes, bit by bit in places. Those
with the mark `gpu` see what is there (test_gpu.py).
"""

import kernels.threads  # noqa: F401 (before torch)

import pytest
import torch

LONGEST = (  # files that two processes share out first, so that both end together
    "test_train", "test_cards", "test_sample", "test_evaluate", "test_end_to_end", "test_annotate", "test_page",
    "test_plan", "test_simulate", "test_traffic", "test_group_norm", "test_make", "test_gpu", "test_encode",
)  # fmt: skip

torch.set_num_threads(1)
torch.cuda.is_available()  # CUDA looks at its environment once: now, as long as nothing is hidden


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """From the first fixture of a test to its last, those of its module among them, also for processes it starts."""
    if item.get_closest_marker("gpu"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)

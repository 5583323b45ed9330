"""Read by pytest before any test: one thread, since operations of this size are slower with two.

Where there are more (test_splat.py), those that wait sleep: torch and Numba each have a pool of OpenMP threads, and by
default a thread that waits spins and takes the other pool's time.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402 (it reads the environment when it is loaded)

torch.set_num_threads(1)

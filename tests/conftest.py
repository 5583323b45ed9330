"""Read by pytest before any test: waiting threads sleep.

torch and Numba each have a pool of OpenMP threads, and by default a thread that waits spins: on two cores, or beside
other programs, one pool then takes the other's time.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

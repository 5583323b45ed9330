"""Imported before torch by every script: threads that wait for others sleep.

OpenMP reads its environment once, when torch loads it. By default a thread that waits spins. With other programs on the
same cores it takes their time, and its own threads wait for theirs: `python sample.py` then takes minutes in the place
of seconds. A user's own OMP_WAIT_POLICY stays.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

"""What is near the machine: kernels and recordings for svd.py on a GPU, and how threads on a CPU wait."""

import kernels.threads  # noqa: F401 (before torch, whatever is imported from here)

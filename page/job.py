"""One dream: sample.py, which ends when the server that started it does, however that ended.

python -m page.job IMAGE arrows.json --out out ...    # the arguments of sample.py; standard input stays open
"""

from __future__ import annotations

import kernels.threads  # noqa: F401 (before torch)

import os
import threading


def end_with_server() -> None:
    """Standard input is a pipe from the server, which writes nothing: it ends when the server is gone."""
    os.read(0, 1)  # not sys.stdin, whose lock the thread would still hold when the dream is done
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_server, daemon=True).start()
    from sample import main

    main()

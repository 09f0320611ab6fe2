"""A Ray cluster whose nodes see the project's folder at the same path."""

import os
import sys
from pathlib import Path

from slm.errors import SlmError


def connect(address: str, root: Path, setting: str) -> None:
    """Join the cluster at `address` ("auto": the one that this machine is in), once per process; its processes find the
    project's packages. Raises SlmError that names `setting` when there is none."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        return
    own = [str(root), *(p for p in sys.path if p and not p.startswith((sys.prefix, sys.base_prefix)))]
    found = {"env_vars": {"PYTHONPATH": os.pathsep.join(own), "OMP_NUM_THREADS": "1"}}
    try:
        ray.init(address, runtime_env=found, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SlmError(f"{setting}: no cluster at {address!r} ({error}); `ray start --head`.") from None

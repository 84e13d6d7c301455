"""What the tests of serving get: vLLM on a CPU, without a network, one thread a process. They run in an environment
of their own.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # families, tiny_text
INSTALLED = importlib.util.find_spec("vllm") is not None

if INSTALLED:
    _cache = tempfile.TemporaryDirectory(prefix="adafuse-vllm-cache-", ignore_cleanup_errors=True)
    os.environ.pop("TRITON_INTERPRET", None)  # vLLM would compile its kernels with it
    os.environ.update(
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="WARNING",
        OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # else every engine takes the same core
        VLLM_CACHE_ROOT=_cache.name,  # nothing compiled by an earlier run
    )

collect_ignore_glob = [] if INSTALLED else ["test_*.py"]

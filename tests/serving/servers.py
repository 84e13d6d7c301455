"""A server that `adafuse serve` starts, with a tiny model, and what its two models must answer."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import tiny
from engines import compare

MODELS = ("tuned", "plain")
LENGTH = 256


class Server:
    """A running server, and the HuggingFace models it must agree with. machines: as many parts of it, a rank each, here on one."""

    def __init__(self, folder, family="llama", machines=1):
        self.base = tiny.save_base(family, folder / "base")
        self.adapter = tiny.save_adapter(self.base, folder / "adapter", shared_rank=2)
        self.models = {"tuned": tiny.reference(self.base, self.adapter), "plain": tiny.reference(self.base, None)}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        command = [sys.executable, "-m", "adafuse.cli", "serve", "--adapter", self.adapter, "--base", self.base]
        command += ["--name", "tuned", "--base-name", "plain", "--load-interval", "0.5"]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", LENGTH, "--block-size", 32]
        command += ["--num-gpu-blocks-override", 512]  # all of which the first few hundred requests write to
        several = ["--tensor-parallel-size", machines, "--nnodes", machines, "--master-addr", "127.0.0.1"]
        command += [*several, "--master-port", free_port()] if machines > 1 else []
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_HOST_IP": "127.0.0.1"}
        ranks = [["--port", self.port], *(["--node-rank", rank, "--headless"] for rank in range(1, machines))]
        with self.log.open("w") as log:
            self.process, *self.others = (
                subprocess.Popen([*map(str, [*command, *rank])], stdout=log, stderr=log, env=environment)
                for rank in ranks
            )

    def wait(self):
        until = time.monotonic() + 400
        while time.monotonic() < until and self.process.poll() is None:
            try:
                return self.get("/health")
            except OSError:
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-4000:])

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def post(self, path, body):
        """(status, answer)."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, model, prompt, **more):
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}
        status, answer = self.post("/v1/completions", {**body, "return_token_ids": True, "logprobs": 0})
        assert status == 200, answer
        choice = answer["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def check(self, model, prompt, **more):
        """The text of one prompt is HuggingFace's."""
        ids, logprobs = self.complete(model, prompt, **more)
        compare([(ids, logprobs)], [tiny.judge(self.models[model], prompt, ids)])

    def metric(self, name):
        """The sum of a metric over its labels."""
        values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, values))

    def memory(self) -> int:
        """Bytes that the server's processes hold."""
        return sum(_resident(pid) for pid in descendants(self.process.pid))

    def stop(self):
        for process in (self.process, *self.others):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid):
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [pid, *(each for child in children for each in descendants(child))]


def _resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running(folder, **options):
    server = Server(folder, **options)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def together(server, requests):
    """Answers of all requests, sent at once."""

    async def run():
        return await asyncio.gather(*(asyncio.to_thread(server.complete, *request) for request in requests))

    return asyncio.run(run())


def check_both(server):
    requests = [(model, prompt) for prompt in tiny.prompts(8, 120) for model in MODELS]
    for _ in range(2):  # the second time with cached prefixes
        found = together(server, requests)
        judged = [
            tiny.judge(server.models[m], prompt, ids) for (m, prompt), (ids, _) in zip(requests, found, strict=True)
        ]
        compare(found, judged)
        assert all(found[i][0] != found[i + 1][0] for i in range(0, len(found), 2))

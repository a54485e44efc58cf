"""A server with vLLM's routes for weight updates, in this process, over real HTTP; for tests."""

import threading
import time
from http.server import ThreadingHTTPServer
from urllib.parse import urlsplit

from gossamer.comm.engines.rank import RankFollower
from gossamer.comm.log import WeightLog
from json_server import JsonHandler
from served_model import ServedModel, loaded, runtime_of

EVERY = "audit_every_versions"


class ServedEngine:
    """Two ranks of one model; `faults` are run before a route is served, and may raise."""

    def __init__(self, ranks=2):
        self.calls, self.faults, self.weight_version = [], {}, "default"
        self.ranks = ranks
        self.begin()
        engine = self

        class Handler(JsonHandler):
            def do_POST(self):  # noqa: N802
                body = self.body()
                try:
                    status, answer = 200, engine.serve(urlsplit(self.path), body)
                except Exception as error:
                    status, answer = 500, {"error": {"message": f"{error}"}}
                self.reply(status, answer)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def begin(self):
        """What a start leaves: models without a log."""
        self.models = [ServedModel(rank, self.ranks) for rank in range(self.ranks)]
        self.followers, self.updating, self.paused = [], [False] * self.ranks, False

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def serve(self, url, body):
        route = url.path[1:]
        name = body.get("method", route)
        if "status" not in name:
            self.calls.append(f"{name}?{url.query}" if url.query else name)
        if fault := self.faults.get(name):  # a test may clear them meanwhile
            fault()
        call = getattr(self, name)
        return {"results": call(*body["args"])} if route == "collective_rpc" else call(**body)

    def init_weight_transfer_engine(self, init_info):
        url, key, every = (init_info[name] for name in ("log_url", "public_key", EVERY))
        self.followers = [
            RankFollower(WeightLog.open(url, public_key=key), runtime_of(model), every)
            for model in self.models
        ]

    def gossamer_status(self):
        if not self.followers:
            return [{} for _ in self.models]
        pairs = zip(self.followers, self.updating, strict=True)
        return [{**follower.status(), "updating": updating} for follower, updating in pairs]

    def gossamer_stage(self, version):
        return [follower.stage(version) for follower in self.followers]

    def gossamer_roll_back(self):
        self.updating = [False] * self.ranks
        return [follower.roll_back() for follower in self.followers]

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False

    def start_weight_update(self):
        assert not any(self.updating), "an update is active"
        self.updating = [True] * self.ranks

    def update_weights(self, update_info):
        failures = []
        for rank, follower in enumerate(self.followers):
            try:
                follower.commit(**update_info)
            except Exception as error:
                self.updating[rank] = False
                failures.append(error)
        if failures:
            raise failures[0]

    def finish_weight_update(self, weight_version):
        self.updating = [False] * self.ranks
        for follower in self.followers:
            follower.finish()
        self.weight_version = weight_version

    def is_at(self, state):
        """True when every rank computes with `state`."""
        for rank, model in enumerate(self.models):
            expected = loaded(state, rank, self.ranks)
            for name, tensor in model.state().items():
                if not tensor.equal(expected[name]):
                    return False
        return True

    def wait_until(self, holds, timeout_s=60.0):
        deadline_s = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline_s, self.calls[-20:]
            time.sleep(0.005)

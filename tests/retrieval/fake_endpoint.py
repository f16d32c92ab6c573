"""A real OpenAI-compatible server on loopback that misbehaves as told, and counts the texts that it answered well.

As a script: `python fake_endpoint.py RATE`, which prints its address and gives RATE of its answers wrong.
"""

import base64
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

DIM = 8
FAULTS = ("429", "429 after", "500", "hang", "short", "nan", "dimension", "shuffled", "broken", "drop")


def vector_of(text, dim=DIM):
    """Numbers that depend on the text alone, not of length 1."""
    digest = b"".join(hashlib.sha256(f"{n} {text}".encode()).digest() for n in range(-(-dim // 32)))
    return np.frombuffer(digest[:dim], np.uint8).astype(np.float32) - 127.5


def unit_of(text, dim=DIM):
    vector = vector_of(text, dim).astype(np.float64)
    return vector / np.linalg.norm(vector)


class FakeEndpoint:
    """`with FakeEndpoint(...) as server`: `server.url`. Faults come from `script`, one for each request, then at `rate`."""

    def __init__(self, script=(), rate=0.0, faults=FAULTS, seed=0, hang=1.0, retry_after="0", delay=0.0, dim=DIM):
        self.script, self.rate, self.faults = list(script), rate, faults
        self.hang, self.retry_after, self.delay, self.dim = hang, retry_after, delay, dim
        # of texts whose vector is never usable, whatever the fault
        self.poisoned = {}
        self.chat = lambda prompt: "what is it?"
        self.answered, self.requests, self.times, self.headers, self.paths = Counter(), [], [], [], []
        self.given = Counter()
        self.lock, self._random = threading.Lock(), random.Random(seed)
        self.running = self.most_running = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def interrupt_when(self, texts=0, requests=0):
        """Press Ctrl-C on this process as soon as so many texts were answered and requests have come."""

        def watch():
            while self.answered.total() < texts or len(self.requests) < requests:
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=watch, daemon=True).start()

    def fault(self):
        with self.lock:
            if self.script:
                name = self.script.pop(0)
            else:
                name = self._random.choice(self.faults) if self._random.random() < self.rate else None
            self.given[name] += 1
            return name

    def embeddings(self, request, fault):
        """The items of the answer, and the texts that are answered well."""
        texts, dim = request["input"], request.get("dimensions", self.dim)
        rows = []
        for index, text in enumerate(texts):
            vector = vector_of(text, dim)
            wrong = self.poisoned.get(text) or ("nan" if fault == "nan" and index == len(texts) // 2 else None)
            if wrong == "nan":
                vector[dim // 2] = np.nan
            if wrong == "zeros":
                vector[:] = 0
            if fault == "dimension" or wrong == "dimension":
                vector, wrong = vector[:-1], "dimension"
            rows.append((index, vector, wrong))
        if fault == "short":
            rows = rows[: len(rows) // 2] if len(rows) > 1 else []
        if fault == "shuffled":
            rows = rows[::-1]
        return rows, [texts[index] for index, _, wrong in rows if wrong is None]

    def listed(self, request, rows):
        coded = request.get("encoding_format") == "base64"
        data = []
        for index, vector, _ in rows:
            value = base64.b64encode(vector.astype("<f4").tobytes()).decode() if coded else vector.tolist()
            data.append({"object": "embedding", "index": index, "embedding": value})
        used = sum(len(text.split()) for text in request["input"])
        usage = {"prompt_tokens": used, "total_tokens": used}
        return {"object": "list", "data": data, "model": request["model"], "usage": usage}

    def completion(self, request):
        prompt = request["messages"][-1]["content"]
        with self.lock:
            self.answered[prompt] += 1
        message = {"role": "assistant", "content": self.chat(prompt)}
        usage = {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}

    def _handler(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                with fake.lock:
                    counts = {
                        "texts": sum(fake.answered.values()),
                        "distinct": len(fake.answered),
                        "requests": len(fake.requests),
                        "given": {str(name): count for name, count in fake.given.items()},
                    }
                body = json.dumps(counts)
                self.answer(200, body)

            def answer(self, status, body, **headers):
                body = body.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.requests.append(request)
                    fake.times.append(time.monotonic())
                    fake.headers.append(dict(self.headers))
                    fake.paths.append(self.path)
                    fake.running += 1
                    fake.most_running = max(fake.most_running, fake.running)
                try:
                    self.respond(request, fake.fault())
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with fake.lock:
                        fake.running -= 1

            def respond(self, request, fault):
                time.sleep(fake.delay)
                if fault == "429":
                    return self.answer(429, '{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}')
                if fault == "429 after":
                    return self.answer(429, '{"error": {"message": "slow down"}}', Retry_After=fake.retry_after)
                if fault == "quota":
                    return self.answer(429, '{"error": {"message": "no money", "code": "insufficient_quota"}}')
                if fault == "500":
                    return self.answer(500, "<html>Internal Server Error</html>")
                if fault in ("400", "401", "404"):
                    said = f"refused {self.headers.get('Authorization')}"
                    return self.answer(int(fault), json.dumps({"error": {"message": said}}))
                if fault == "hang":
                    time.sleep(fake.hang)
                    return self.answer(500, "{}")
                if fault == "drop":
                    self.close_connection = True
                    return None
                if fault == "broken":
                    return self.answer(200, '{"data": [{"index": 0, "embedding": [0.1,')
                if fault == "empty":
                    return self.answer(200, '{"data": []}')
                if self.path.endswith("/chat/completions"):
                    return self.answer(200, json.dumps(fake.completion(request)))
                rows, well = fake.embeddings(request, fault)
                body = json.dumps(fake.listed(request, rows))
                with fake.lock:
                    fake.answered.update(well)
                return self.answer(200, body)

        return Handler


if __name__ == "__main__":
    with FakeEndpoint(rate=float(sys.argv[1]), hang=float(sys.argv[2]) if len(sys.argv) > 2 else 1.0) as server:
        print(server.url, flush=True)
        sys.stdin.read()

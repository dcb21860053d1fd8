"""A small local server that speaks the chat API: the answers, and the faults, are a function's."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Answer = tuple[int, dict[str, str], str]
"""Status, headers and text."""


@dataclass
class Served:
    """What a server was asked."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most: int = 0
    """Requests at a time, at most."""

    @property
    def questions(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Served]:
    """Serve answers to (request, its number from 0) on a free port, until the end of the block."""
    lock, now = Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.requests)
                served.requests.append(request)
                served.headers.append(dict(self.headers))
                served.paths.append(self.path)
                now[0] += 1
                served.most = max(served.most, now[0])
            status, headers, text = answer(request, number)
            with lock:
                now[0] -= 1
            try:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(text.encode()))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())
            except ConnectionError:  # nobody waits any more
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def says(text: str = "", likely: dict[str, float] | None = None) -> Answer:
    """A chat completion with a text, or with log-probabilities of its first token."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "logprobs": None}
    if likely is not None:
        top = [{"token": token, "logprob": logp} for token, logp in likely.items()]
        choice["logprobs"] = {"content": [{"token": text, "top_logprobs": top}]}
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": [choice]})


def a_model(folder: Path) -> Callable[[dict[str, Any], int], Answer]:
    """Answers of a language model, which reads the question as it is."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def answer(request: dict[str, Any], number: int) -> Answer:
        with torch.no_grad():
            ids = torch.tensor([tokenizer.encode(request["messages"][0]["content"], add_special_tokens=False)])
            logps = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        top = logps.topk(min(request["top_logprobs"], len(logps)))
        words = tokenizer.convert_ids_to_tokens(top.indices.tolist())
        return says(likely=dict(zip(words, top.values.tolist(), strict=True)))

    return answer

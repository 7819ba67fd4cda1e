"""A chat page for your own model, at http://127.0.0.1:8000.

python -m scripts.chat_web
python -m scripts.chat_web -i sft -g d12 -p 8080
python -m scripts.chat_web -n 4                    one model on each of four cards
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from nanochat.chat import AnswerSettings
from nanochat.checkpoint_manager import find_tag, load_model
from nanochat.common import setup_compute
from nanochat.config import Runtime, run_script, short
from nanochat.engine import Engine

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the server."""

    runtime: Runtime = field(default_factory=Runtime)
    source: Annotated[Literal["base", "mid", "sft", "rl"], short("-i")] = "sft"
    """Which stage's model to serve."""
    num_gpus: Annotated[int, short("-n")] = 1
    """How many cards to use, each with its own copy of the model."""
    temperature: Annotated[float, short("-t")] = 0.8
    """Used when a request doesn't say: 0 takes the likeliest token every time."""
    top_k: Annotated[int, short("-k")] = 50
    """Used when a request doesn't say: choose among the k likeliest tokens; 0: among all."""
    max_tokens: Annotated[int, short("-m")] = 512
    """Used when a request doesn't say: the longest answer, in tokens."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""
    step: Annotated[int | None, short("-s")] = None
    """Step of the checkpoint; default: the last."""
    port: Annotated[int, short("-p")] = 8000
    """Where to listen."""
    host: str = "127.0.0.1"
    """Who may connect: 127.0.0.1 is this machine only, 0.0.0.0 is everybody who can reach it."""
    queue_size: int = 16
    """How many requests may wait; more are told to try again later."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"--temperature must be between 0 and 2, got {self.temperature}")
        if not 0 <= self.top_k <= 200:
            raise ValueError(f"--top_k must be between 0 (all tokens) and 200, got {self.top_k}")
        if not 1 <= self.max_tokens <= 4096:
            raise ValueError(f"--max_tokens must be between 1 and 4096, got {self.max_tokens}")
        if self.num_gpus < 1:
            raise ValueError(f"--num_gpus must be at least 1, got {self.num_gpus}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be between 0 (any free one) and 65535, got {self.port}")
        if self.queue_size < 0:
            raise ValueError(f"--queue_size must not be negative, got {self.queue_size}")


def listen(host: str, port: int) -> socket.socket:
    """The listening socket, opened before the model is loaded so that a taken port shows at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise RuntimeError(f"can't listen on {host}, port {port} ({error.strerror}): choose another --port") from error


def choose_devices(device: torch.device, num_gpus: int) -> list[torch.device]:
    """One device per worker."""
    if num_gpus == 1:
        return [device]
    if device.type != "cuda" or torch.cuda.device_count() < num_gpus:
        found = torch.cuda.device_count() if device.type == "cuda" else 0
        raise ValueError(f"--num_gpus={num_gpus}, but there are {found} CUDA cards to use: ask for fewer")
    return [torch.device("cuda", i) for i in range(num_gpus)]


def main(cfg: Config) -> None:
    """Load the model on every device and serve it."""
    folder = find_tag(cfg.source, cfg.model_tag)
    with listen(cfg.host, cfg.port) as server_socket, setup_compute(cfg.runtime) as compute:
        engines = []
        for device in choose_devices(compute.device, cfg.num_gpus):
            model, tokenizer, meta = load_model(cfg.source, device, "eval", cfg.model_tag, cfg.step)
            engines.append(Engine(model, tokenizer, compute.precision))
        info = {
            "name": f"{folder.name} {cfg.source}",
            "step": meta["step"],
            "params": model.num_params(),
            "dtype": compute.precision.name,
        }
        import uvicorn

        from nanochat.web import create_app

        defaults = AnswerSettings(cfg.temperature, cfg.top_k, cfg.max_tokens)
        app = create_app(engines, tokenizer, defaults, info, cfg.queue_size)
        if cfg.host not in LOCAL_HOSTS:
            print(f"warning: everybody who can reach {cfg.host} can use this server; it asks for no password")
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        print(f"{info['name']}, step {info['step']}: http://{host}:{server_socket.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[server_socket])


if __name__ == "__main__":
    run_script(main, Config)

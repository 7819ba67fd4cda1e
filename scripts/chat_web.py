"""A chat page and an OpenAI-compatible API for your own model, at http://127.0.0.1:8000 and http://127.0.0.1:8000/v1.

python -m scripts.chat_web
python -m scripts.chat_web -i sft -g d12 -p 8080
python -m scripts.chat_web -n 4                    one model on each of four cards
NANOCHAT_API_KEY=... python -m scripts.chat_web --host 0.0.0.0
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import torch

from nanochat.common import Compute, get_base_dir, setup_compute
from nanochat.config import Runtime, run_script, short
from nanochat.generate.fast_decode import Weights
from nanochat.generate.kv_cache import fitting_slots
from nanochat.generate.rounding import rounding_notice
from nanochat.generate.sampling import Sampling
from nanochat.serve.answers import DRAIN_SECONDS
from nanochat.serve.app import create_app
from nanochat.serve.batch_engine import BatchEngine
from nanochat.serve.choose_model import BASE_NOTICE, choose_drawing, find_model, load_chosen
from nanochat.serve.evaluation import read_evaluation
from nanochat.serve.guard import LOCAL_HOSTS, Access, parse_origin, parse_public_url, parse_root_path
from nanochat.serve.http_server import listen, make_server

USUAL = {"temperature": 0.8, "top_k": 50}
KEY_VARIABLE = "NANOCHAT_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the server."""

    runtime: Runtime = field(default_factory=Runtime)
    source: Annotated[Literal["base", "mid", "sft", "rl"], short("-i")] = "sft"
    """Which stage's model to serve."""
    num_gpus: Annotated[int, short("-n")] = 1
    """How many cards to use, each with its own copy of the model."""
    temperature: Annotated[float | None, short("-t")] = None
    """Used when a request doesn't say: 0 takes the likeliest token every time. Default: what SFT found to suit the
    model, else 0.8."""
    top_k: Annotated[int | None, short("-k")] = None
    """Used when a request doesn't say: choose among the k likeliest tokens; 0: among all. Default: what SFT found to
    suit the model, else 50."""
    min_answer_p: float | None = None
    """Instead of an answer that the model finds less likely than this, say that it does not know; 0: let it guess.
    Default: what SFT found to suit the model."""
    max_tokens: Annotated[int | None, short("-m")] = None
    """Used when a request doesn't say: the longest answer, in tokens; default: as many as the context has room for."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""
    step: Annotated[int | None, short("-s")] = None
    """Step of the checkpoint; default: the last."""
    hf_path: str | None = None
    """Serve a nanochat in the format of transformers instead: a folder, or a hub repository (owner/name)."""
    port: Annotated[int, short("-p")] = 8000
    """Where to listen."""
    host: str = "127.0.0.1"
    """Who may connect: 127.0.0.1 is this machine only, 0.0.0.0 is everybody who can reach it (with the key)."""
    api_key: str | None = None
    """What clients must send as `Authorization: Bearer KEY`; default: $NANOCHAT_API_KEY, which other users of this
    machine can't see in the list of processes."""
    insecure: bool = False
    """Serve others than this machine without a key."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server: https://example.org, http://localhost:*, app:// (every origin of that
    scheme), null (pages opened as files), * (all)."""
    public_url: str | None = None
    """The address under which a proxy makes this server known, such as https://example.org/chat."""
    root_path: str | None = None
    """The path under which a proxy makes it known; default: that of --public_url."""
    weights: Weights = "auto"
    """What the weights are read as while generating: bfloat16, int8 and int4 (both CPU) are faster and less exact, the
    last most. What int8 or int4 costs this model is measured and said at the start."""
    max_batch_size: int | None = None
    """Answers written at the same time by each card; default: 32, fewer where their contexts would take
    more than 4 GiB."""
    queue_size: int = 64
    """How many requests may wait at each card; more are told to try again later."""
    log_conversations: Path | None = None
    """Append what is asked and answered to this file; default: conversations are not kept."""

    def __post_init__(self) -> None:
        ranges = {"temperature": (0, 2), "top_k": (0, 200), "min_answer_p": (0, 1), "port": (0, 65535)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"--{name} must be between {least} and {most}, got {value}")
        for name, least in {"num_gpus": 1, "queue_size": 0, "max_batch_size": 1, "max_tokens": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if self.log_conversations is not None and self.log_conversations.is_dir():
            raise ValueError(f"--log_conversations={self.log_conversations} is a folder: name a file in it")
        self.access(None)  # checks itself

    def access(self, key: str | None) -> Access:
        """The rules of access that the flags ask for, with `key`."""
        public_url = parse_public_url(self.public_url) if self.public_url else None
        path = urlsplit(public_url or "").path if self.root_path is None else self.root_path
        return Access(
            api_key=key,
            cors_origins=tuple(map(parse_origin, self.cors_origins)),
            local_only=self.host in LOCAL_HOSTS and key is None,
            public_url=public_url,
            root_path=parse_root_path(path),
        )


def choose_devices(device: torch.device, num_gpus: int) -> list[torch.device]:
    """One device per worker."""
    if num_gpus == 1:
        return [device]
    if device.type != "cuda" or torch.cuda.device_count() < num_gpus:
        found = torch.cuda.device_count() if device.type == "cuda" else 0
        raise ValueError(f"--num_gpus={num_gpus}, but there are {found} CUDA cards to use: ask for fewer")
    return [torch.device("cuda", i) for i in range(num_gpus)]


def choose_key(cfg: Config) -> str | None:
    """Return the key that clients must send, None for none.

    Raises:
        ValueError: the server would be open to others without one, or the key can't be sent in a header.
    """
    key = os.environ.get(KEY_VARIABLE) if cfg.api_key is None else cfg.api_key
    if not key:
        if cfg.host not in LOCAL_HOSTS and not cfg.insecure:
            raise ValueError(
                f"everybody who can reach {cfg.host} could use this server: give a key with --api_key or "
                f"${KEY_VARIABLE}, or say --insecure"
            )
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("the API key may hold printable ASCII characters only, without spaces")
    return key


def load_engines(cfg: Config, name: str, compute: Compute) -> tuple[list[BatchEngine], Any, dict[str, Any]]:
    """Load the model on every device: (engines, tokenizer, what the page shows about the model)."""
    engines = []
    for device in choose_devices(compute.device, cfg.num_gpus):
        model, tokenizer, meta = load_chosen(cfg.source, cfg.model_tag, cfg.step, cfg.hf_path, device)
        batch_size = cfg.max_batch_size or fitting_slots(model.config, compute.precision.dtype)
        engines.append(
            BatchEngine(
                model,
                tokenizer,
                compute.precision,
                max_batch_size=batch_size,
                max_queue=cfg.queue_size,
                weights=cfg.weights,
            )
        )
    if notice := rounding_notice(model, tokenizer, compute.precision, cfg.weights):
        print(notice)
    config = model.config
    evaluated = f"{cfg.source}_{name.removesuffix(f' {cfg.source}')}_{meta['step']:06d}"  # as scripts.chat_eval has it
    info = {
        "id": name.replace(" ", "-"),
        "name": name,
        "step": meta["step"],
        "params": model.num_params(),
        "dtype": compute.precision.name,
        # Each stage is validated in its own way: by bits per byte, by the loss of answers, by problems solved.
        "bpb": meta.get("val_bpb"),
        "val_loss": meta.get("val_loss"),
        "pass_at_1": meta.get("pass@1"),
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
        "context_length": config.sequence_len,
        "sampling": meta.get("sampling"),
        "plain": cfg.source == "base",
        **({} if cfg.hf_path else read_evaluation(get_base_dir() / "chat_eval" / evaluated)),
    }
    return engines, tokenizer, info


def main(cfg: Config) -> None:
    """Load the model on every device and serve it."""
    key = choose_key(cfg)
    name = find_model(cfg.source, cfg.model_tag, cfg.hf_path)
    with listen(cfg.host, cfg.port) as server_socket, setup_compute(cfg.runtime) as compute:
        engines, tokenizer, info = load_engines(cfg, name, compute)
        access = cfg.access(key)
        drawing, why = choose_drawing(info, cfg.temperature, cfg.top_k, USUAL, cfg.min_answer_p)
        defaults = Sampling(**drawing, max_tokens=cfg.max_tokens)
        app = create_app(engines, tokenizer, defaults, info, access, cfg.log_conversations)
        if key is None and (cfg.host not in LOCAL_HOSTS or "*" in access.cors_origins):
            who = (
                "every web page can use this server"
                if cfg.host in LOCAL_HOSTS
                else f"everybody who can reach {cfg.host} can use this server"
            )
            print(f"warning: {who}; it asks for no key")
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        url = access.public_url or f"http://{host}:{server_socket.getsockname()[1]}{access.root_path}"
        print(f"{info['name']}, step {info['step']}: {url} (OpenAI's API: {url}/v1)")
        print(why + (f"\n{BASE_NOTICE}" if info["plain"] else ""), flush=True)
        make_server(app, DRAIN_SECONDS).run(sockets=[server_socket])


if __name__ == "__main__":
    run_script(main, Config)

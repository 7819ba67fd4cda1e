"""What a chat server costs beside its model, and what clients that are slow, silent or gone do to the others.

    python dev/bench/serve_hostile.py                   # the newest chat model of $NANOCHAT_BASE_DIR

Starts `scripts.chat_web` with room for 1,024 open files, in a process of its own, and checks
  overhead   one token, not streamed, over a kept-alive connection: the median is at most 3 ms above that of the same
             request to an engine in this process, asked in turn
  leavers    `clients` clients for `seconds`, one in five answers left at a random moment: no error of the others, no
             place lost, memory flat
  silent     `silent` connections that say nothing and as many that send a byte a second, opened again when closed, for
             `seconds`: /health answers new connections within 100 ms (99 %), and the log gets fewer than 100 lines
Prints a line per check and one JSON line; exits with 1 if a check fails. Times mean little if other programs use the
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
import httpx
import psutil
import torch
from serve_load import QUESTIONS, Load, Tally, parser, start_server

from nanochat.common import setup_compute
from nanochat.config import Runtime
from nanochat.generate.sampling import Sampling
from nanochat.serve.batch_engine import BatchEngine, GenerationRequest
from nanochat.serve.choose_model import load_chosen

OPEN_FILES = 1024
CHECKS = ("overhead", "leavers", "silent")
WARM_UP = (64, 48, 40, 32, 28, 24, 22, 20, 18, 16, 12, 8)  # clients, so that every number of answers occurs


def overhead(url: str, args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of a request of one token: {"http": ..., "engine": ...}."""
    times: dict[str, list[float]] = {"http": [], "engine": []}
    client = http.client.HTTPConnection(*url.removeprefix("http://").split(":"), timeout=60)  # httpx takes 1 ms itself
    with setup_compute(Runtime()) as compute, contextlib.closing(client):
        model, tokenizer, _ = load_chosen(args.source, args.model_tag, None, None, compute.device)
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        body = {"messages": messages, "max_tokens": 1, "temperature": 0}
        tokens = tokenizer.render_for_completion({"messages": messages})
        request = GenerationRequest(tokens=tokens, sampling=Sampling(temperature=0.0, max_tokens=1))
        with BatchEngine(model, tokenizer, compute.precision) as engine:

            def by_http() -> None:
                client.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
                if len(json.loads(client.getresponse().read())["choices"]) != 1:
                    raise RuntimeError("no answer")

            def by_engine() -> None:
                list(engine.submit(request).events())

            for turn in range(220):
                for name, ask in (("http", by_http), ("engine", by_engine)):
                    start = time.perf_counter()
                    ask()
                    if turn >= 20:
                        times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


async def leavers(load: Load, clients: int, seconds: float) -> tuple[Tally, int]:
    """(what those that stay received, how many answers were left)."""
    tally, rng, end, left = Tally(), random.Random(1), time.perf_counter() + seconds, 0

    async def client(number: int) -> None:
        nonlocal left
        turn = number
        while time.perf_counter() < end:
            turn += 1
            question = QUESTIONS[turn % len(QUESTIONS)]
            if rng.random() < 0.2:
                left += 1
                with contextlib.suppress(TimeoutError, httpx.HTTPError):
                    with anyio.fail_after(rng.uniform(0.0, 1.0)):
                        async for _ in load.events(question):
                            pass
                continue
            try:
                await load.ask(question, tally)
            except httpx.HTTPError as error:
                tally.errors.append(repr(error))

    await asyncio.gather(*(client(i) for i in range(clients)))
    return tally, left


async def silent(url: str, count: int, seconds: float) -> tuple[list[float], int]:
    """(milliseconds of /health on new connections, how many connections the others have opened)."""
    host, port = url.removeprefix("http://").split(":")
    end, opened, times = time.perf_counter() + seconds, 0, []

    async def hold(slow: bool) -> None:
        nonlocal opened
        while time.perf_counter() < end:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(host, int(port))
                opened += 1
                sent = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
                for i in range(len(sent) if slow else 1):
                    if slow:
                        writer.write(sent[i : i + 1])
                    with anyio.move_on_after(1.0 if slow else max(0.1, end - time.perf_counter())):
                        await reader.read()
                        break
                writer.close()
            await asyncio.sleep(0.5)  # a flood of new ones as well, but not all of this machine's time

    def healthy() -> None:
        time.sleep(2.0)
        while time.perf_counter() < end:
            connection = http.client.HTTPConnection(host, int(port), timeout=20)
            start = time.perf_counter()
            connection.request("GET", "/health")
            if connection.getresponse().status != 200:
                raise RuntimeError("/health was refused")
            times.append(1000 * (time.perf_counter() - start))
            connection.close()
            time.sleep(0.1)

    # In a thread, so that its clock does not also measure the event loop of the others.
    await asyncio.gather(asyncio.to_thread(healthy), *(hold(slow=i % 2 == 1) for i in range(2 * count)))
    return times, opened


async def measure(url: str, process: psutil.Process, log: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of all checks, with the names of those that failed."""
    figures: dict[str, Any] = {"failures": []}

    def check(name: str, fine: bool, said: str) -> None:
        print(f"{'ok  ' if fine else 'FAIL'} {name}: {said}", flush=True)
        if not fine:
            figures["failures"].append(name)

    if "overhead" in args.only:
        medians = await asyncio.to_thread(overhead, url, args)
        more = medians["http"] - medians["engine"]
        check("overhead", more <= 3.0, f"{medians['http']} ms by HTTP, {medians['engine']} ms by the engine alone")
        figures.update(overhead_ms=round(more, 2), **medians)
    if "leavers" in args.only:
        load = Load(url, args.max_tokens)
        for question in QUESTIONS:
            await load.ask(question, Tally())
        # What is taken only once is taken now: pages of the cache that no context was long enough for before, and above
        # all oneDNN's kernels, one for each number of answers that are written together: on the demo model some 50 MiB.
        for clients in WARM_UP:
            await leavers(load, clients, args.seconds / len(WARM_UP))
        before, memory = await load.idle(), process.memory_info().rss
        tally, left = await leavers(load, args.clients, args.seconds)
        after, grown = await load.idle(), (process.memory_info().rss - memory) / 2**20
        await load.http.aclose()
        counts = {k: sum(w[k] for w in after["workers"]) for k in ("submitted", "finished", "cancelled", "failed")}
        cancelled = counts["cancelled"] - sum(w["cancelled"] for w in before["workers"])
        fine = not tally.errors and not tally.wrong and counts["submitted"] == counts["finished"] + counts["cancelled"]
        check(
            "leavers",
            fine and grown < 20,
            f"{tally.answers} answers, {left} left ({cancelled} cancelled), {len(tally.errors)} errors "
            f"{tally.errors[:1]}, {tally.wrong} wrong, {tally.refused} refused, {counts}, memory {memory / 2**20:.0f} "
            f"{grown:+.1f} MiB, {process.num_threads()} threads",
        )
        figures.update(leavers_errors=len(tally.errors), leavers_memory_mib=round(grown, 1))
    if "silent" in args.only:
        lines = len(log.read_text().splitlines())
        times, opened = await silent(url, args.silent, args.seconds)
        lines, times = len(log.read_text().splitlines()) - lines, sorted(times)
        middle, late = statistics.median(times), times[int(0.99 * len(times))]
        check(
            "silent",
            late < 100 and lines < 100,
            f"/health {middle:.1f} ms (median), {late:.1f} ms (99 %), {times[-1]:.1f} ms (most) of {len(times)} while "
            f"{opened} connections came; {lines} lines in the log; {process.num_fds()} open files",
        )
        figures.update(health_ms_median=round(middle, 1), health_ms_99=round(late, 1), log_lines=lines)
    return figures


def main() -> None:
    """Start the server, measure, stop it."""
    flags = parser(__doc__)
    flags.add_argument("--silent", type=int, default=500)
    flags.add_argument("--only", choices=CHECKS, nargs="+", default=CHECKS)
    args = flags.parse_args()
    torch.set_num_threads(1)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        # The server inherits the limit; this process needs more for its connections.
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, most))
        with open(log, "wb") as file:
            server, url = start_server(args, file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        try:
            figures = asyncio.run(measure(url, psutil.Process(server.pid), log, args))
        finally:
            server.terminate()
            server.wait(60)
            print("".join(line for line in log.read_text().splitlines(keepends=True)[:20]), file=sys.stderr)
    print(json.dumps(figures))
    sys.exit(1 if figures["failures"] else 0)


if __name__ == "__main__":
    main()

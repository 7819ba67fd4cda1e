"""Load the chat server: many streaming clients at once, more than it can take, and clients that leave.

    python dev/bench/serve_load.py                      # the newest chat model of $NANOCHAT_BASE_DIR
    python dev/bench/serve_load.py --seconds 60 --clients 64 --queue 64

Starts `scripts.chat_web` in a process of its own on a free port, and checks
  one        one client at a time, for a quarter of the time, half of it before and half after the many clients: the
             baseline
  many       `clients` clients for `seconds`: no error, no 429, fair shares, greedy answers equal to the single ones,
             tokens per second compared with one client (at least 4 times as many on the demo model)
  flood      256 clients at once: those refused get a well-formed 429 with Retry-After, the others the right answers
  leavers    500 clients that leave at a random moment: no slot is lost, and memory does not grow
Prints a line per check and one JSON line; exits with 1 if a check fails. `cpu` says how many cores the server used: far
less than one under load means that other programs used the machine, and the tokens per second mean little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import anyio
import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = [
    "Why is the sky blue?",
    "What is 24 * 17?",
    "Who are you?",
    "How many r are in strawberry?",
    "Tell me about rivers.",
    "What is 12 + 30?",
    "Why do birds sing?",
    "Say hello.",
]


@dataclass
class Tally:
    """Counts what the clients of a check received."""

    answers: int = 0
    tokens: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    refused: int = 0
    malformed: int = 0
    per_client: list[int] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)


class Load:
    """Clients of one server; `expected` has the answer to each question when it was asked alone."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self.url, self.max_tokens, self.expected = url, max_tokens, {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=512)
        self.http = httpx.AsyncClient(base_url=url, timeout=120, limits=limits)

    def body(self, question: str) -> dict[str, Any]:
        """A greedy request."""
        messages = [{"role": "user", "content": question}]
        return {"messages": messages, "temperature": 0, "max_tokens": self.max_tokens}

    async def events(self, question: str) -> AsyncIterator[dict[str, Any]]:
        """The events of an answer, and {"refused": response} for a 429."""
        async with self.http.stream("POST", "/chat/completions", json=self.body(question)) as response:
            if response.status_code != 200:
                await response.aread()
                yield {"refused": response}
                return
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    yield json.loads(line[6:])

    async def ask(self, question: str, tally: Tally) -> int:
        """Ask, check and count; returns the number of tokens of the answer."""
        text, tokens, start, ended = "", 0, time.perf_counter(), False
        async for event in self.events(question):
            if "refused" in event:
                self.check_refusal(event["refused"], tally)
                return 0
            if "error" in event:
                tally.errors.append(event["error"])
            if not text and not tokens:
                tally.first_token.append(time.perf_counter() - start)
            text += "".join(f"[{key} {event[key]}]" for key in ("python", "python_output") if key in event)
            text += event.get("token", "")
            tokens += event.get("usage", {}).get("completion", 0)
            ended = ended or event.get("done", False)
        if not ended:
            tally.errors.append("a stream without an end")
        tally.wrong += text != self.expected.setdefault(question, text)
        tally.answers += 1
        tally.tokens += tokens
        return tokens

    @staticmethod
    def check_refusal(response: httpx.Response, tally: Tally) -> None:
        """Count a 429 that says when to try again, and anything else as an error."""
        if response.status_code != 429:
            tally.errors.append(f"status {response.status_code}: {response.text[:100]}")
            return
        tally.refused += 1
        try:
            error = response.json()["error"]
            well_formed = int(response.headers["retry-after"]) >= 1 and error["code"] == "queue_full"
        except (KeyError, ValueError):
            well_formed = False
        tally.malformed += not well_formed

    async def clients(self, count: int, seconds: float) -> tuple[Tally, float]:
        """`count` clients ask one question after another for `seconds`; returns the tally and the seconds it took."""
        tally, start = Tally(), time.perf_counter()

        async def client(number: int) -> int:
            tokens, turn = 0, number
            while time.perf_counter() < start + seconds:
                try:
                    tokens += await self.ask(QUESTIONS[turn % len(QUESTIONS)], tally)
                except httpx.HTTPError as error:
                    tally.errors.append(repr(error))
                turn += 1
            return turn - number

        tally.per_client = await asyncio.gather(*(client(i) for i in range(count)))
        return tally, time.perf_counter() - start

    async def flood(self, count: int) -> Tally:
        """`count` clients ask once, all at the same time."""
        tally = Tally()

        async def client(number: int) -> None:
            try:
                await self.ask(QUESTIONS[number % len(QUESTIONS)], tally)
            except httpx.HTTPError as error:
                tally.errors.append(repr(error))

        await asyncio.gather(*(client(i) for i in range(count)))
        return tally

    async def leave(self, count: int, at_once: int) -> None:
        """`count` clients ask and leave after a random time or number of events."""
        rng, places = random.Random(1), asyncio.Semaphore(at_once)

        async def client(number: int, wait: float, enough: int) -> None:
            async with places:
                seen = 0
                try:
                    with anyio.fail_after(wait):
                        async for _ in self.events(QUESTIONS[number % len(QUESTIONS)]):
                            seen += 1
                            if seen > enough:
                                return
                except (TimeoutError, httpx.HTTPError):
                    pass

        await asyncio.gather(*(client(i, rng.uniform(0.005, 1.0), rng.randrange(12)) for i in range(count)))

    async def idle(self) -> dict[str, Any]:
        """The server's statistics as soon as nothing runs there."""
        for _ in range(600):
            stats = (await self.http.get("/stats")).json()
            if not stats["running"] and not stats["waiting"]:
                return stats
            await asyncio.sleep(0.1)
        raise RuntimeError("the server does not become idle: a slot was lost")


def start_server(args: argparse.Namespace, log: IO[bytes] | None = None) -> tuple[subprocess.Popen[bytes], str]:
    """Start the server, which writes to `log`; returns its process and its address as soon as it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scripts.chat_web", "-p", str(port), "--queue_size", str(args.queue)]
    command += ["-i", args.source, *(["-g", args.model_tag] if args.model_tag else []), *args.server_args]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            httpx.get(f"{url}/health")
            return process, url
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError("the server did not start within two minutes")


def parser(about: str | None) -> argparse.ArgumentParser:
    """The flags of a bench of the server."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--source", default="sft")
    parser.add_argument("--model_tag")
    parser.add_argument("server_args", nargs="*", help="after --: more flags for scripts.chat_web")
    return parser


def cpu_seconds(process: psutil.Process) -> float:
    """The processor time that the server has used."""
    times = process.cpu_times()
    return times.user + times.system


async def measure(url: str, process: psutil.Process, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """(figures, failures) of all checks."""
    load, failures, figures = Load(url, args.max_tokens), [], {}

    def check(name: str, fine: bool, said: str) -> None:
        print(f"{'ok  ' if fine else 'FAIL'} {name}: {said}", flush=True)
        if not fine:
            failures.append(name)

    await load.clients(1, 1.0)  # warm up; then every question once:
    for question in QUESTIONS:
        await load.ask(question, Tally())
    cpu = [cpu_seconds(process)]
    one, seconds_one = await load.clients(1, args.seconds / 8)
    cpu.append(cpu_seconds(process))
    many, seconds_many = await load.clients(args.clients, args.seconds)
    cpu.append(cpu_seconds(process))
    again, seconds_again = await load.clients(1, args.seconds / 8)
    cpu.append(cpu_seconds(process))
    cores = (cpu[2] - cpu[1]) / seconds_many
    per_cpu_one = (one.tokens + again.tokens) / (cpu[1] - cpu[0] + cpu[3] - cpu[2])
    per_cpu = many.tokens / (cpu[2] - cpu[1])
    speed_one = (one.tokens + again.tokens) / (seconds_one + seconds_again)
    fine = not (one.errors or one.wrong or again.errors or again.wrong)
    check("one", fine, f"{speed_one:.0f} tokens/s, {one.answers + again.answers} answers")
    speed, fewest, most = many.tokens / seconds_many, min(many.per_client), max(many.per_client)
    fairness = most / max(1, fewest)
    check("many: errors", not many.errors, f"{len(many.errors)} errors {many.errors[:1]}")
    check("many: 429s", not many.refused, f"{many.refused}")
    check("many: right", not many.wrong, f"{many.wrong} of {many.answers} answers differ from the single run")
    check("many: fair", fairness <= 3, f"answers per client {fewest} to {most}, {fairness:.2f} times")
    ttft = statistics.median(many.first_token)
    check("many: speed", speed >= 4 * speed_one, f"{speed:.0f} tokens/s, {speed / speed_one:.2f} times one at a time")
    print(f"     first token after {ttft:.2f} s (median)")
    print(
        f"     cpu: the server used {cores:.2f} of {os.cpu_count()} cores; tokens per processor second "
        f"{per_cpu:.0f}, {per_cpu / per_cpu_one:.2f} times one at a time"
    )

    flood = await load.flood(256)
    check(
        "flood",
        not flood.errors and not flood.wrong and flood.refused > 0 and not flood.malformed,
        f"{flood.answers} answers, {flood.refused} refused, {flood.malformed} malformed, "
        f"{len(flood.errors)} errors {flood.errors[:1]}",
    )

    before = await load.idle()
    await load.leave(50, args.clients)  # what is allocated only once is allocated now
    await load.idle()
    # The web framework keeps up to 40 threads for short work.
    memory, threads = process.memory_info().rss, process.num_threads()
    await load.leave(500, args.clients)
    after = await load.idle()
    grown, more = (process.memory_info().rss - memory) / 2**20, process.num_threads() - threads
    worker = {key: sum(w[key] for w in after["workers"]) for key in ("submitted", "finished", "cancelled", "failed")}
    balanced = worker["submitted"] == worker["finished"] + worker["cancelled"] and not worker["failed"]
    left = worker["cancelled"] - sum(w["cancelled"] for w in before["workers"])
    check(
        "leavers",
        balanced and grown < 50 and more <= 40,
        f"{left} answers cancelled, all accounted for: {balanced}, memory {grown:+.1f} MiB, threads {more:+d}",
    )
    last = Tally()
    await load.ask(QUESTIONS[0], last)
    check("afterwards", last.answers == 1 and not last.wrong, "the next answer is right")
    figures.update(
        tokens_per_second_one=round(speed_one, 1), tokens_per_second_many=round(speed, 1),
        speedup=round(speed / speed_one, 2), clients=args.clients, answers=many.answers, errors=len(many.errors),
        refused=many.refused, wrong=many.wrong, fairness=round(fairness, 2), median_first_token_seconds=round(ttft, 3),
        cores=round(cores, 2), speedup_per_cpu=round(per_cpu / per_cpu_one, 2),
        flood_refused=flood.refused, memory_growth_mib=round(grown, 1), failures=failures,
    )  # fmt: skip
    await load.http.aclose()
    return figures, failures


def main() -> None:
    """Start the server, measure, stop it."""
    args = parser(__doc__).parse_args()
    server, url = start_server(args)
    try:
        figures, failures = asyncio.run(measure(url, psutil.Process(server.pid), args))
    finally:
        server.terminate()
        server.wait(60)
    print(json.dumps(figures))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

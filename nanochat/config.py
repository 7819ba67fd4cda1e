"""The command line: one typed dataclass per script, parsed by tyro, and one way to run a script's `main`.

`--depth=8`, `--device_batch_size 16` and `--device-batch-size=16` all work. Nested configs carry no prefix
(`--dtype`, not `--runtime.dtype`). A bad flag or value names itself and exits with 2; an error of the run exits with 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from nanochat.env import error_text, printable

T = TypeVar("T")
MOST = 1e30  # that a number among the settings may be: products of larger ones end beyond what a float holds
# The flags that `--help` of a script shows if it has more than MANY_FLAGS; `--help_all` shows all.
MANY_FLAGS = 12
FIRST_FLAGS = {
    # of most scripts
    *("source", "model_tag", "hf_path", "dtype", "hours", "num_iterations", "device_batch_size"),
    # training
    *("depth", "data_dir", "dataset", "recipe", "total_batch_size", "max_seq_len", "chat_data", "lora_rank"),
    # RL and evaluation
    *("task", "num_samples", "task_name", "tasks", "max_problems", "max_per_task"),
    # chat
    *("prompt", "system", "temperature", "top_k", "max_tokens", "port", "host", "api_key"),
}
# Flags of nanochat's base_train that no script has here.
INSTEAD = {
    "resume_from_step": "an unfinished run goes on by itself, see --resume",
    "core_metric_every": "`python -m scripts.base_eval` measures CORE after the run",
    "core_metric_max_per_task": "`python -m scripts.base_eval --max_per_task`",
}


def short(*names: str) -> Any:
    """Annotate a field with a short flag: `prompt: Annotated[str, short("-p")] = ""`."""
    import tyro  # lazy: dev/gpu_check.py needs only torch and numpy

    return tyro.conf.arg(aliases=list(names))


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The flags that every script has: device, precision, seed."""

    device_type: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """The device: auto takes cuda, then mps, then cpu."""
    dtype: Annotated[Literal["auto", "float32", "float16", "bfloat16"], short("-d")] = "auto"
    """The precision: auto follows the card (P100 float16, A100 and newer bfloat16, CPU float32)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: auto measures whether it pays (CUDA capability 7.0 or newer, long training runs)."""
    fp16_gemm: Literal["auto", "on", "off"] = "auto"
    """Training in float16: accumulate the blocks' products in float16 too, which a P100 is fast at (auto: on a P100, if
    a check on the card finds it exact and fast enough)."""
    seed: int = 42
    """Seed of every random number generator."""
    deterministic: bool = False
    """Bit-reproducible on a card too, somewhat slower; on a CPU it always is."""

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed must have at most 63 bits, got {self.seed}")


def parse_config(config: type[T], argv: Sequence[str] | None = None) -> T:
    """Build `config` from the command line (`sys.argv` by default); exits with 2 on a bad flag or value."""
    import tyro  # lazy: dev/gpu_check.py needs only torch and numpy

    if not dataclasses.is_dataclass(config):
        raise TypeError(f"{config} is not a dataclass")
    args = list(sys.argv[1:] if argv is None else argv)
    # nanochat's own scripts take an empty device type for "auto".
    args = [a for a in args if a not in ("--device_type=", "--device-type=")]
    about = config.__doc__ or ""
    if {"--help_all", "--help-all"} & set(args):
        args = ["--help"]
    elif {"-h", "--help"} & set(args):
        flags = _flags(config)
        hidden = [flag for flag in flags if not _shown_first(flag)]
        if len(flags) > MANY_FLAGS and hidden:
            config, args = _first_flags(config), ["--help"]
            about = f"{about}\n\n{len(hidden)} more flags: {command_name()} --help_all"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config,
                prog=command_name(),
                description=about,
                args=args,
                use_underscores=True,  # as nanochat writes them; hyphens are understood too
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except BrokenPipeError:
        raise _leave_closed_pipe() from None
    except SystemExit as stop:
        if not stop.code:  # after --help, whose text may wait in the buffer
            try:
                sys.stdout.flush()
            except BrokenPipeError:
                raise _leave_closed_pipe() from None
        if stop.code:
            message = _one_line(said.getvalue())
            if "Unrecognized options" in message:
                message += _instead_of_nanochats(args)
            print(f"error: {printable(message)} (--help lists all flags)", file=sys.stderr)
        raise


def flag_names(config: type[Any]) -> list[str]:
    """Names of all flags of a config, nested ones included."""
    return [field.name for field in _flags(config)]


def _flags(config: type[Any]) -> list[dataclasses.Field[Any]]:
    found: list[dataclasses.Field[Any]] = []
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        found += _flags(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else [field]
    return found


def _shown_first(flag: dataclasses.Field[Any]) -> bool:
    needed = flag.default is dataclasses.MISSING and flag.default_factory is dataclasses.MISSING
    return needed or flag.name in FIRST_FLAGS


def _first_flags(config: type[T]) -> type[T]:
    """`config` whose help shows FIRST_FLAGS and what must be given: a subclass with the other fields suppressed."""
    import tyro  # lazy: dev/gpu_check.py needs only torch and numpy

    hints = get_type_hints(config, include_extras=True)
    annotations: dict[str, Any] = {}
    body: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name, hint = field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            annotations[name] = nested = _first_flags(hint)  # type: ignore[arg-type]
            body[name] = dataclasses.field(default_factory=nested)
        elif not _shown_first(field):
            annotations[name] = Annotated[hint, tyro.conf.Suppress]
            body[name] = dataclasses.field(default=field.default, default_factory=field.default_factory)
    kind = type(config.__name__, (config,), {"__module__": config.__module__, "__doc__": config.__doc__, **body})
    kind.__annotations__ = annotations
    return dataclasses.dataclass(frozen=True, kw_only=True)(kind)


def _instead_of_nanochats(args: Sequence[str]) -> str:
    """Names what replaces those of nanochat's flags among `args` that do not exist here."""
    names = dict.fromkeys(arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in args if arg.startswith("--"))
    return "".join(f"; instead of nanochat's --{name}: {INSTEAD[name]}" for name in names if name in INSTEAD)


def _one_line(box: str) -> str:
    """The message of the box that tyro draws, in one line."""
    lines = [line.strip("╭╮╰╯│─ \n") for line in box.splitlines()]
    start = 1 if lines and lines[0] else 0  # after the title
    kept = []
    for line in lines[start:]:
        if line.startswith(("For full helptext", "Argument helptext")):
            break
        kept.append(line)
    return " ".join(line for line in kept if line.strip("-")) or "the flags could not be understood"


def positive(value: float | None) -> Any:
    """`value`, or None if it is 0 or below: nanochat's users switch things off with 0 and with -1."""
    return value if value is not None and value > 0 else None


def command_name() -> str:
    """How this program was started: `python -m scripts.plan`, or `python path` for a file."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None or not spec.name:
        return f"python {os.path.relpath(sys.argv[0])}" if sys.argv[0] else "python"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def _leave_closed_pipe() -> SystemExit:
    """The end of a program whose reader (`| head`) has gone: nothing more is printed, not even at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return SystemExit(141)  # as a shell reports SIGPIPE


def run_script(main: Callable[[Any], Any], config: type[Any], argv: Sequence[str] | None = None) -> None:
    """Parse `config` and call `main` with it.

    Errors that a user can cause are printed as one sentence without a traceback, and exit with 1
    (set NANOCHAT_TRACEBACK=1 to see where they came from).
    """
    cfg = parse_config(config, argv)
    try:
        _record(main)(cfg)
        sys.stdout.flush()
    except BrokenPipeError:
        raise _leave_closed_pipe() from None
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if os.environ.get("NANOCHAT_TRACEBACK") == "1":
            raise
        text = printable(error_text(error))
        rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"error{rank}: {text}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _record(main: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`main`; under torchrun its error also goes to torchrun, which names the rank that failed first."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record  # lazy: torch, for a command line

    return record(main)

"""The order of the house: who may import whom, where an import stands, how long a file gets, one meaning per name.

Everything here reads source text with `ast`; no module of the project is imported.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module or wing of nanochat, and what nothing in it may import ("nanochat" itself: nothing of the project).
NEVERS = {
    "env": "torch nanochat",
    "ops": "nanochat",
    "gpt": "generate data train",
    "generate": "serve common data train",
    "data": "gpt train report",
    "report": "train data gpt",
    "plan": "train pipeline report",
    "pipeline": "train serve generate interop",
    "serve": "train data plan pipeline report",
    "interop": "train serve pipeline",
    "sandbox": "nanochat",
}
# Of what the table above forbids.
ALLOWED = {"ops": "precision ops", "sandbox": "sandbox", "pipeline": "interop.start_model"}

# These start before anything is installed, or in a process that must start fast: nothing but the standard library.
BARE = ["env", "cards", "pipeline.card_checks", "pipeline.session", "sandbox.child"]

# What programs outside use. `python -m NAME` needs a __main__ block or module.
NAMES = {
    "nanochat.common": "autodetect_dtype download_file_with_lock get_base_dir print0",
    "nanochat.gpt": "GPT GPTConfig",
    "nanochat.engine": "Engine",
    "nanochat.dataloader": "PretrainLoader",
    "nanochat.dataset": "prepare_corpus",
    "nanochat.tokenizer": "RustBPETokenizer get_tokenizer",
    "nanochat.checkpoint_manager": "load_model load_checkpoint save_checkpoint",
    "nanochat.core_eval": "evaluate_core evaluate_task",
    "nanochat.loss_eval": "evaluate_bpb",
    "nanochat.execution": "execute_code",
    "nanochat.optim": "MuonAdamW",
    "nanochat.muon": "orthogonalize",
    "nanochat.report": "Report get_report",
    "nanochat.pipeline.session": "run_until sync",
}
COMMANDS = [
    *(f"nanochat.{name}" for name in ("cards", "dataset", "pipeline", "pipeline.verify", "report")),
    *(f"scripts.tok_{name}" for name in ("cache", "eval", "train")),
    *(f"scripts.base_{name}" for name in ("eval", "loss", "train")),
    *(f"scripts.chat_{name}" for name in ("cli", "eval", "rl", "sft", "web")),
    *(
        f"scripts.{name}"
        for name in (
            "export_gguf",
            "export_hf",
            "export_page",
            "import_classic",
            "import_hf",
            "infer_bench",
            "mid_train",
        )
    ),
    *(f"scripts.{name}" for name in ("monitor", "plan")),
]

# Standard modules that are missing on some systems.
UNIX_ONLY = {"fcntl", "pty", "resource", "termios"}


@functools.cache
def sources() -> dict[str, Path]:
    """The modules of nanochat by name. Files that are copied into exported folders are no part of the package."""
    files = [f for f in sorted((ROOT / "nanochat").rglob("*.py")) if "hf_code" not in f.parts]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


@functools.cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that a statement imports; of `from package import name` the submodule, if it is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "imports are absolute"
    base = node.module or ""
    names = [f"{base}.{alias.name}" for alias in node.names]
    return list(dict.fromkeys(name if name in sources() else base for name in names))


@functools.cache
def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """Every import of a file, wherever it stands."""
    nodes = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Import | ast.ImportFrom)]
    return [(target, node) for node in nodes for target in targets(node)]


def is_part(module: str, whole: str) -> bool:
    """True if `module` is `whole` or lies within it."""
    return module == whole or module.startswith(f"{whole}.")


def forbidden_imports() -> Iterator[str]:
    """Arrows that point upwards."""
    for module, path in sources().items():
        for part, nevers in NEVERS.items():
            if not is_part(module, f"nanochat.{part}"):
                continue
            walls = [name if name in ("torch", "nanochat") else f"nanochat.{name}" for name in nevers.split()]
            doors = [f"nanochat.{name}" for name in ALLOWED.get(part, "").split()]
            for target, _ in imports(path):
                if any(is_part(target, w) for w in walls) and not any(is_part(target, d) for d in doors):
                    yield f"{module} imports {target}"


def circles() -> Iterator[str]:
    """Imports from which a way leads back, those in functions and for type checkers included."""
    graph = {m: {t for t, _ in imports(p) if t in sources()} for m, p in sources().items()}
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[start] = seen
    for module, found in graph.items():
        for target in sorted(found):
            if module in reached[target]:
                yield f"{module} -> {target} is part of a circle"


def required_packages() -> set[str]:
    """Top-level modules that every installation has: the standard library, this project, its dependencies."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed
    packages = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)', listed[1])}
    renamed = {"yaml", "sse_starlette", "starlette", "markdown_it", "markupsafe"}
    return set(sys.stdlib_module_names) - UNIX_ONLY | packages | renamed | {"nanochat", "scripts", "tasks", "rustbpe"}


def hidden_imports() -> Iterator[str]:
    """Imports in a function that are neither optional nor in a block of imports that begins with `# lazy: why`."""
    required = required_packages()
    above = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "tasks").rglob("*.py")]
    for path in [*sources().values(), *sorted(above)]:
        lines = path.read_text(encoding="utf-8").splitlines()
        functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {id(n): n for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)}
        excused = -1  # the last line of a block that says why
        for node in sorted(inside.values(), key=lambda n: n.lineno):
            written = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if re.search(r"# lazy: \w", written) or node.lineno == excused + 1:
                excused = node.end_lineno or node.lineno
                continue
            for target in targets(node):
                if target.partition(".")[0] in required:
                    yield f"{path.relative_to(ROOT).as_posix()} imports {target} inside a function"


def shared_names() -> Iterator[str]:
    """Public classes and functions that two modules define."""
    homes: dict[str, set[str]] = defaultdict(set)
    for module, path in sources().items():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
                homes[node.name].add(module)
    for name, modules in sorted(homes.items()):
        if len(modules) > 1 and name not in ("main", "Config"):
            yield f"{name} is defined more than once"


def long_modules() -> Iterator[str]:
    """Files that should be two."""
    for path in [*sources().values(), *sorted((ROOT / "scripts").glob("*.py"))]:
        name = path.relative_to(ROOT).as_posix()
        if path.read_text(encoding="utf-8").count("\n") > (600 if name == "nanochat/gpt.py" else 450):
            yield f"{name} is too long"


def crowded_top() -> Iterator[str]:
    """The folder that a reader opens first."""
    if len(list((ROOT / "nanochat").glob("*.py"))) > 28:
        yield "nanochat/ has more than 28 files at the top"


def missing_names() -> Iterator[str]:
    """What programs outside import or run, and would not find."""
    for module, names in NAMES.items():
        if module not in sources():
            yield f"{module} is gone"
            continue
        bound = set()
        body = tree(sources()[module]).body
        for node in [*body, *(inner for outer in body if isinstance(outer, ast.With) for inner in outer.body)]:
            bound |= {getattr(node, "name", "")}
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Assign):
                bound |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        yield from (f"{module} has no {name}" for name in names.split() if name not in bound)
    for command in COMMANDS:
        base = ROOT.joinpath(*command.split("."))
        path = next((f for f in (base / "__main__.py", base.with_suffix(".py")) if f.is_file()), None)
        if path is None or (path.stem != "__main__" and '__name__ == "__main__"' not in path.read_text("utf-8")):
            yield f"python -m {command} does nothing"


@functools.cache
def bound_names(path: Path) -> set[str]:
    """What a module defines or imports, wherever in it."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name):
            names.add(node.id)
    return names


def dangling_imports() -> Iterator[str]:
    """Imports, tools and benchmarks included, of what the package no longer has."""
    for folder in ("nanochat", "scripts", "tasks", "dev", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for module, node in imports(path) if "hf_code" not in path.parts else ():
                if not is_part(module, "nanochat"):
                    continue
                if module not in sources():
                    yield f"{name} imports {module}, which is gone"
                elif isinstance(node, ast.ImportFrom) and module == node.module:
                    wanted = {alias.name for alias in node.names if f"{module}.{alias.name}" not in sources()}
                    yield from (f"{name}: {module} has no {n}" for n in wanted - bound_names(sources()[module]))


def heavy_starts() -> Iterator[str]:
    """Modules that must start with the standard library alone, and what they load beyond it."""
    for start in BARE:
        waiting, seen = [f"nanochat.{start}"], set()
        while waiting:
            module = waiting.pop()
            if module in seen or module not in sources():
                continue
            seen.add(module)
            if "." in module:
                waiting.append(module.rpartition(".")[0])  # the package is run first
            skipped = {
                id(n)
                for outer in ast.walk(tree(sources()[module]))
                if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
                or (isinstance(outer, ast.If) and ast.unparse(outer.test).endswith("TYPE_CHECKING"))
                for n in ast.walk(outer)
            }
            for target, node in imports(sources()[module]):
                if id(node) in skipped:
                    continue
                waiting.append(target)
                if target.partition(".")[0] not in sys.stdlib_module_names | {"nanochat"}:
                    yield f"nanochat.{start} loads {target}"


RULES = {
    "imports point downwards": forbidden_imports,
    "no circle": circles,
    "imports stand at the top": hidden_imports,
    "one public name, one meaning": shared_names,
    "no long module": long_modules,
    "few files at the top": crowded_top,
    "named imports and commands stay": missing_names,
    "imports lead somewhere": dangling_imports,
    "light starts": heavy_starts,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_house(rule):
    assert sorted(set(RULES[rule]())) == []


def test_what_git_tracks_in_a_package_is_packaged():
    """A wheel holds the modules of packages, and the files that `package-data` names."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[tool.setuptools.package-data]\n")[2].partition("\n\n")[0]
    data = re.findall(r'^"?([\w.]+)"? = \[(.*)\]$', section, re.MULTILINE)
    globs = [f"{package.replace('.', '/')}/{g}" for package, listed in data for g in re.findall(r'"([^"]+)"', listed)]
    command = ["git", "ls-files", "nanochat", "scripts", "tasks"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    for file in tracked:
        path = ROOT / file
        if path.exists() and not (path.suffix == ".py" and (path.parent / "__init__.py").exists()):
            assert any(fnmatch(file, g) for g in globs), f"{file} is not packaged"
    for g in globs:
        if not g.startswith("rustbpe"):
            assert list(ROOT.glob(g)), f"package-data names {g}, and there is none"

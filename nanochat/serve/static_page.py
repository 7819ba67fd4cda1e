"""The chat page without a server: a folder of files in which the browser itself runs the model.

The page is the server's (nanochat/serve/ui); what talked to the server there is exchanged for the files in
nanochat/serve/static, and llama.cpp, compiled to WebAssembly (the npm package @wllama/wllama), runs the GGUF file.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat.env import get_base_dir
from nanochat.files import write_bytes, write_json, write_text
from nanochat.gpt import GPT
from nanochat.serve.app import LIMITS, UI_FOLDER
from nanochat.tokenizer import RustBPETokenizer

STATIC_FOLDER = Path(__file__).parent / "static"
FACTS_FILE, MODEL_FILE = "model.json", "model.gguf"
DEFAULTS = {"temperature": 0.8, "top_k": 50}  # those of chat_web, and so is:
MAX_TOKENS = 512

WLLAMA = "@wllama/wllama"
WLLAMA_VERSION = "2.4.0"
# Of the package's tarball, as npm's `integrity` has it: base64 of SHA-512.
WLLAMA_HASH = "KuVHeTUXcqHF01d85q3nWaRSVLpszULNGjO+nx4cyZ8sBjZvKSMViWNCfcs/1w2bqjyegERJzWsrdQSHSEoSlQ=="
# The last version whose page can hand over tokens: from 3.0 on there are only texts, in which a user could write the
# tokens that end a turn.
WLLAMA_FILES = {
    "module": "esm/index.js",
    "single": "esm/single-thread/wllama.wasm",
    "multi": "esm/multi-thread/wllama.wasm",
    "licence": "LICENCE",
}
CDN = "https://cdn.jsdelivr.net"
# Nothing but this folder is loaded, and nothing is sent anywhere. WebAssembly needs a word of its own, and wllama
# starts its threads from code that it holds in memory.
POLICY = (
    "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'{cdn}; worker-src 'self' blob:; style-src 'self'; "
    "img-src 'self'; connect-src 'self' blob:{cdn}; base-uri 'none'; form-action 'none'"
)


def wllama_tarball(given: Path | None) -> bytes:
    """Return the npm package's tarball: a file, the one that an earlier call downloaded, or a download with npm.

    Raises:
        RuntimeError: it cannot be had; says what to do.
        ValueError: it is not the file that this code was made for.
    """
    if given is not None:
        if not given.is_file():
            raise RuntimeError(f"--wllama={given} is no file: `npm pack {WLLAMA}@{WLLAMA_VERSION}` makes it")
        return _checked(given.read_bytes(), str(given))
    kept = get_base_dir() / "wllama" / f"wllama-{WLLAMA_VERSION}.tgz"
    if not kept.exists() or _hash(kept.read_bytes()) != WLLAMA_HASH:
        write_bytes(kept, _checked(_download(), "what npm downloaded"))
    return kept.read_bytes()


def _download() -> bytes:
    package = f"{WLLAMA}@{WLLAMA_VERSION}"
    remedy = f"fetch `npm pack {package}` elsewhere and give its file with --wllama, or take --cdn"
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"npm is not installed, which downloads {package}: install Node.js, {remedy}")
    with tempfile.TemporaryDirectory() as folder:
        run = [npm, "pack", package, "--ignore-scripts", "--silent"]
        done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
        files = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(files) != 1:
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise RuntimeError(f"npm could not download {package} ({reason}): {remedy}")
        return files[0].read_bytes()


def _hash(data: bytes) -> str:
    return base64.b64encode(hashlib.sha512(data).digest()).decode()


def _checked(data: bytes, name: str) -> bytes:
    if _hash(data) != WLLAMA_HASH:
        raise ValueError(f"{name} is not {WLLAMA} {WLLAMA_VERSION}: its SHA-512 is another; get it anew")
    return data


def wllama_files(tarball: bytes) -> dict[str, bytes]:
    """Return the files of the npm package that a page needs, by their names in it."""
    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
        members = {name: archive.extractfile(f"package/{name}") for name in WLLAMA_FILES.values()}
        return {name: member.read() for name, member in members.items() if member is not None}


def refuse_other_page(folder: Path) -> None:
    """Only such a page may be replaced.

    Raises:
        ValueError: the folder holds something else; names what.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / FACTS_FILE).is_file() or not (folder / "sw.js").is_file():
        raise ValueError(f"--output={folder} is there and holds no exported page: choose another folder")
    own = {FACTS_FILE, MODEL_FILE, "wllama", *(p.name for place in (UI_FOLDER, STATIC_FOLDER) for p in place.iterdir())}
    others = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if others:
        raise ValueError(
            f"--output={folder} holds a page and also {', '.join(others[:5])}, which would be lost: choose another "
            "folder"
        )


def page_facts(
    name: str, model: GPT, tokenizer: RustBPETokenizer, meta: Mapping[str, Any], kind: str
) -> dict[str, Any]:
    """Return what the page knows about its model; of the same form as what a server's /stats says of it.

    Args:
        name: what the page calls the model.
        model: the model.
        tokenizer: its tokenizer.
        meta: its checkpoint's record.
        kind: what the matrices are stored in.
    """
    config = model.config
    return {
        "model": {
            "name": name,
            "step": meta.get("step"),
            "params": model.num_params(),
            "dtype": kind,
            "bpb": meta.get("val_bpb"),
            "val_loss": meta.get("val_loss"),
            "n_layer": config.n_layer,
            "n_embd": config.n_embd,
            "vocab_size": config.vocab_size,
            "context_length": config.sequence_len,
        },
        "special": {token: tokenizer.encode_special(token) for token in sorted(tokenizer.get_special_tokens())},
        # As chat_web: what SFT found to suit the model goes before the usual settings.
        "defaults": DEFAULTS
        | {name: value for name, value in (meta.get("sampling") or {}).items() if name in DEFAULTS}
        | {"max_tokens": min(MAX_TOKENS, config.sequence_len)},
        "limits": {**LIMITS, "max_tokens": config.sequence_len},
    }


def add_page(folder: Path, facts: Mapping[str, Any], wllama: Mapping[str, bytes] | None) -> None:
    """Write the page into a folder that already holds the model as MODEL_FILE.

    Args:
        folder: where.
        facts: what `page_facts` returns.
        wllama: the npm package's files; None: the page loads them from a content delivery network.
    """
    for source in (UI_FOLDER, STATIC_FOLDER):  # the second has an api.js that replaces the first's
        for path in sorted(source.iterdir()):
            shutil.copyfile(path, folder / path.name)
    for name, data in (wllama or {}).items():
        write_bytes(folder / "wllama" / name, data)
    program = sum(len((wllama or {}).get(WLLAMA_FILES[key], b"")) for key in ("module", "multi"))
    base = "./wllama/" if wllama is not None else f"{CDN}/npm/{WLLAMA}@{WLLAMA_VERSION}/"
    addresses = {key: base + name for key, name in WLLAMA_FILES.items()}
    size = (folder / MODEL_FILE).stat().st_size
    write_json(
        folder / FACTS_FILE, {**facts, "file": MODEL_FILE, "bytes": size, "program_bytes": program, "wllama": addresses}
    )
    page = (folder / "index.html").read_text(encoding="utf-8")
    name = html.escape(str(facts["model"]["name"]))
    policy = POLICY.format(cdn="" if wllama is not None else f" {CDN}")
    head = '<meta name="color-scheme"'
    for old, new in {
        head: f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n  {head}',
        "</head>": '  <link rel="stylesheet" href="./static.css">\n</head>',
        "<title>nanochat</title>": f"<title>{name}</title>",
        "Talk to your own model": f"Talk to {name}",
        "Talk to a model you trained yourself": f"Talk to {name}, which runs in your browser",
    }.items():
        assert old in page, old
        page = page.replace(old, new)
    write_text(folder / "index.html", page)
    # The name of the browser's cache: another one as soon as any file is.
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    worker = (folder / "sw.js").read_text(encoding="utf-8")
    write_text(folder / "sw.js", worker.replace("{version}", digest.hexdigest()[:16]))

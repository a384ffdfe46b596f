"""Build the stub driver (`driver/`) for the CUDA build of torch in this environment."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCES = sorted((Path(__file__).parent / "driver").glob("*.[ch]"))
BUILDS = Path(__file__).resolve().parents[2] / ".cuda-driver"
LIBRARY = "libcuda.so.1"
BACKEND = "backends/nvidia"
ALIASES = ("libcuda.so", "libnvidia-ml.so.1")
"""Names under which Triton links it and torch and nvidia-ml-py load it."""
STOOD_IN_FOR = re.compile(r"(__cuda|cuda|cublas|nccl|cu)[A-Z]\w*")
REAL = re.compile(r"cu(File|sparse|fft|solver|rand|dnn)")
"""Libraries of which only handles are made, on which nothing is computed."""


def build_driver() -> Path:
    """Return the folder of the library, built at the first call. Needs gcc and binutils."""
    torch_folder, triton_folder = _package_folder("torch"), _package_folder("triton")
    key = hashlib.sha256(f"{version('torch')} {torch_folder}".encode())
    for source in [Path(__file__), *SOURCES]:
        key.update(source.read_bytes())
    folder = BUILDS / key.hexdigest()[:16]
    if not (folder / LIBRARY).exists():
        building = folder.with_name(f"{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        _build(building, torch_folder, triton_folder)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    return folder


def _package_folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed here: see `make test-cuda`")
    return Path(spec.origin).parent


def _build(folder: Path, torch_folder: Path, triton_folder: Path) -> None:
    headers = [*torch_folder.parent.glob("nvidia/*/include"), triton_folder / BACKEND / "include"]
    includes = [f"-I{path}" for path in headers]
    flags = ["-w", "-fPIC", "-O1", "-fvisibility=hidden", *includes]
    objects = []
    for source in SOURCES:
        if source.suffix == ".c":
            objects.append(folder / f"{source.stem}.o")
            _run("gcc", "-std=gnu11", *flags, "-c", source, "-o", objects[-1])
    ours = _symbols("--defined-only", *objects)
    wanted = _symbols("-D", "--undefined-only", *(torch_folder / "lib").glob("lib*.so"))
    # Triton's and torch's own look-ups are by name.
    texts = [triton_folder / BACKEND / "driver.c", torch_folder / "lib/libc10_cuda.so"]
    for text in texts:
        wanted |= set(re.findall(r"\bcu[A-Z][A-Za-z0-9]+\b", text.read_bytes().decode("latin-1")))
    missing = sorted(
        name for name in wanted - ours if STOOD_IN_FOR.fullmatch(name) and not REAL.match(name)
    )
    generated = folder / "generated.c"
    lines = [f"EXPORT long {name}(void) {{ CALL(); return 0; }}" for name in missing]
    generated.write_text("\n".join(['#include "card.h"', *lines, ""]))
    header = SOURCES[0].parent
    library = ["-shared", f"-Wl,-soname,{LIBRARY}", "-o", folder / LIBRARY]
    _run("gcc", *flags, f"-I{header}", *library, *objects, generated, "-ldl", "-lpthread")
    for alias in ALIASES:
        (folder / alias).symlink_to(LIBRARY)


def _symbols(*arguments: object) -> set[str]:
    lines = _run("nm", *arguments).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if len(line.split()) > 1}


def _run(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, text=True, stdout=subprocess.PIPE
    ).stdout

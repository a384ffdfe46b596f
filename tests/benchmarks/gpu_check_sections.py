"""The sections of gpu_check.py. Each reports its rows as it measures them."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt.artifacts import DatasetManifest, Split
from gpt.config.loading import build_config
from gpt.config.schema import RunConfig
from gpt.data.shards import ShardWriter, read_manifest, write_manifest
from gpt.hardware.device import describe_device, is_out_of_memory, pick_device
from gpt.hardware.gpus import GPUSpec, find_gpu
from gpt.model.compile import find_compiler_error
from gpt.preflight.calibration import compare_measurement
from gpt.preflight.checks import gib
from gpt.preflight.memory import estimate_memory
from gpt.preflight.time import nominal_throughput
from gpt.training.calibration import measure_card, measure_steps
from gpt.training.loop import fit, setup, train
from gpt.training.step import TrainState

MEMORY_LIMIT_BYTES = 12_282 * 2**20
"""An RTX 4070's."""
PEAK_BOUND = 0.03
"""Largest relative difference between a measured peak and the preflight's."""
VOCABULARY = 50_257
PIECES = re.compile(r" ?\w+|\s+|[^\w\s]")
TEXT_BYTES, SMALL_TEXT_BYTES = 24_000_000, 400_000
PLAIN = "plain"


def run_section(options: argparse.Namespace) -> None:
    check = Check(options)
    getattr(check, f"check_{options.section.replace(' ', '_')}")()


def report(what: str, found: str, expected: str = "", ok: bool | None = None) -> None:
    row = {"what": what, "found": found, "expected": expected, "ok": ok}
    print(f"row {json.dumps(row)}", flush=True)


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Report an error as a row, so that the others of the section follow."""
    try:
        yield
    except Exception as error:
        report(what, " ".join(f"{type(error).__name__}: {error}".split())[:300], ok=False)


class Check:
    def __init__(self, options: argparse.Namespace) -> None:
        self.output, self.folder = Path(options.output), Path(options.folder)
        self.small: bool = options.small
        self.device = pick_device("auto")
        self.on_gpu = self.device.type == "cuda"
        self.compiles = self.on_gpu and not find_compiler_error("cuda")
        self.card = describe_device(self.device)
        self.gpu: GPUSpec | None = find_gpu(self.card.name, self.card.memory_bytes)
        stored = options.dataset
        self.dataset = read_manifest(Path(stored)) if stored else self._word_dataset()

    def _word_dataset(self) -> DatasetManifest:
        folder = self.output / ("words-small" if self.small else "words")
        if not (folder / "manifest.json").exists():
            write_word_dataset(folder, SMALL_TEXT_BYTES if self.small else TEXT_BYTES)
        return read_manifest(folder)

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def _config(self, architecture: str, width: int, **overrides: Any) -> RunConfig:
        """Return a config like the shipped ones; plain is trained with that of gpt2."""
        is_nanochat = architecture == "nanochat"
        n_layer, n_head, block_size, batch_size = (
            (2, 2, 32, 2) if self.small else (12, 12, 1024, 16)
        )
        raw: dict[str, dict[str, Any]] = {
            "run": {"name": "gpu-check", "root": str(self.folder)},
            "model": {
                "architecture": "nanochat" if is_nanochat else "gpt2",
                "n_layer": n_layer,
                "n_head": n_head,
                "n_embd": width // 12 if self.small else width,
                "block_size": block_size,
            },
            "data": {"source": "words"},
            "optimizer": {"name": "muon", "weight_decay": 0.05, "grad_clip": 0.0}
            if is_nanochat
            else {"name": "adamw", "learning_rate": 6e-4},
            "schedule": {"name": "linear", "min_learning_rate_ratio": 0.0},
            "training": {
                "batch_size": batch_size,
                "grad_acc": 2,
                "max_steps": 10_000,
                "compile": self.compiles and not self.small,
            },
            "evaluation": {"tokens": 262_144 if not self.small else 256},
            "hardware": {"device": str(self.device)},
        }
        for key, value in overrides.items():
            section, name = key.split("__")
            raw[section][name] = value
        return build_config(raw)

    # --- correctness -----------------------------------------------------------------------------

    def check_correctness(self) -> None:
        card = f"{self.card.name}, driver {self.card.driver}, torch {torch.__version__}"
        report("device", card, ok=None if self.on_gpu else self.small)
        for architecture in ("gpt2", "nanochat"):
            with guarded(f"{architecture}: losses"):
                self._compare_losses(architecture)
        with guarded("resume"):
            self._compare_resumed_losses()
        with guarded("float16 overflow"):
            self._overflow()

    def _small_config(self, architecture: str, **overrides: Any) -> RunConfig:
        values = {
            "model__n_layer": 2,
            "model__n_head": 2,
            "model__n_embd": 64,
            "model__block_size": 32 if self.small else 64,
            "optimizer__name": "adamw",
            "optimizer__learning_rate": 1e-3,
            "training__batch_size": 2 if self.small else 4,
            "training__max_steps": 8 if self.small else 20,
            "training__compile": False,
            "training__dtype": "float32",
            "evaluation__tokens": 256,
        }
        return self._config(architecture, 768, **values | overrides)

    def _losses(self, config: RunConfig, precision: str = "high") -> list[float]:
        """Train from scratch; `precision` is that of float32 products: TF32 if high."""
        folder = self._new_folder()
        state = setup(config, self.dataset, folder)
        torch.set_float32_matmul_precision(precision)
        losses = [record.loss for record in fit(state, folder) if not record.validation]
        return [math.nan if loss is None else loss for loss in losses]

    def _compare_losses(self, architecture: str) -> None:
        on_cpu = self._losses(self._small_config(architecture, hardware__device="cpu"))
        compare_losses(f"{architecture}: loss falls on the CPU", on_cpu[:1], on_cpu[-1:], -0.1)
        with guarded(f"{architecture}: float32 against the CPU"):
            exact = self._losses(self._small_config(architecture), "highest")
            compare_losses(f"{architecture}: float32 against the CPU", exact, on_cpu, 2e-3)
        in_bfloat16 = {"training__dtype": "bfloat16"}
        for what, bound, overrides in (
            ("TF32", 1e-2, {}),
            ("bfloat16", 2e-2, in_bfloat16),
            ("float16", 2e-2, {"training__dtype": "float16"}),
            ("compiled bfloat16", 2e-2, in_bfloat16 | {"training__compile": self.compiles}),
        ):
            name = f"{architecture}: {what} against the CPU"
            if self.small and what == "compiled bfloat16" and architecture == "nanochat":
                continue  # compiling takes minutes on few cores
            with guarded(name):
                found = self._losses(self._small_config(architecture, **overrides))
                compare_losses(name, found, on_cpu, bound)
        if architecture == "nanochat":
            muon = {"optimizer__name": "muon", "optimizer__learning_rate": 0.02}
            on_cpu = self._losses(self._small_config(architecture, **muon, hardware__device="cpu"))
            found = self._losses(self._small_config(architecture, **muon))
            compare_losses("nanochat: Muon in bfloat16 against the CPU's", found, on_cpu, 0.05)

    def _compare_resumed_losses(self) -> None:
        settings = {"model__dropout": 0.1, "training__dtype": "bfloat16"}
        config = self._small_config("gpt2", **settings)
        whole, folder = self._losses(config), self._new_folder()
        parts: list[float] = []
        for stop in (len(whole) // 2, len(whole)):
            steps = train(config, self.dataset, folder)
            for record in steps:
                if record.validation is None:
                    parts.append(math.nan if record.loss is None else record.loss)
                if len(parts) == stop < len(whole):
                    break
            steps.close()
        compare_losses("resumed in the middle, with dropout", parts, whole, 5e-3)

    def _overflow(self) -> None:
        """Let a loss scale overflow: no weight may change until it has fallen far enough."""
        state = TrainState(self._small_config("gpt2", training__dtype="float16"), self.dataset)
        if not state.scaler.is_enabled():
            report("float16 overflow", "n/a on a CPU, which computes in float32")
            return
        state.scaler = torch.amp.GradScaler(state.device.type, init_scale=2.0**40)
        before = [parameter.detach().clone() for parameter in state.model.parameters()]
        norm = math.inf
        while not math.isfinite(norm) and state.skipped_steps < 40:
            loss = torch.zeros((), device=state.device)
            for batch, _ in state.micro_batches():
                loss += state.forward_backward(batch)
            _, norm = state.clip_gradients(loss)
            if not math.isfinite(norm):
                state.skip_update()
        pairs = zip(before, state.model.parameters(), strict=True)
        unchanged = all(torch.equal(old, new) for old, new in pairs)
        state.update_weights()
        finite = state.weights_are_finite()
        found = f"{state.skipped_steps} steps skipped with weights unchanged: {unchanged}; "
        found += f"finite after the next update: {finite}"
        ok = unchanged and finite and math.isfinite(norm) and state.skipped_steps > 0
        report("float16 overflow", found, ok=ok)

    # --- memory, throughput ----------------------------------------------------------------------

    def check_memory(self) -> None:
        if self.on_gpu:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY_LIMIT_BYTES / total))
        for width in (768,) if self.small else (768, 720, 576, 480):
            with guarded(f"peak memory, nanochat {width}"):
                self._compare_peak(width)

    def _compare_peak(self, width: int) -> None:
        config = self._config("nanochat", width, training__compile=self.compiles)
        measured = measure_steps(config, self._new_folder() / "tokens", 2.0)
        assert measured.config
        size = measured.config.training.batch_size
        estimate = estimate_memory(measured.config).compiled_bytes
        found, ok = f"n/a, micro-batch of {size}, {measured.value:,.0f} tokens/s", None
        if measured.peak_bytes:
            error = measured.peak_bytes / estimate - 1
            found = found.replace("n/a", f"{gib(measured.peak_bytes)}, {error:+.1%}", 1)
            ok = abs(error) <= PEAK_BOUND and size == config.training.batch_size
        expected = f"{gib(estimate)}, micro-batch of {config.training.batch_size}"
        # Small networks hold little beside what the allocator rounds.
        report(f"peak memory, nanochat {width}", found, expected, None if self.small else ok)

    def check_throughput(self) -> None:
        rates: dict[str, float] = {}
        for recipe in (PLAIN, "gpt2", "nanochat"):
            with guarded(f"{recipe}, width 768"):
                rates[recipe] = self._measure_rate(recipe)
                self._rates_file.write_text(json.dumps(rates))

    def _measure_rate(self, recipe: str) -> float:
        config = self._config(recipe, 768)
        if recipe == PLAIN:
            config, rate = self._time_plain(config)
        else:
            measured = measure_steps(config, self._new_folder() / "tokens", 8.0)
            assert measured.config
            config, rate = measured.config, measured.value
        found = f"{rate:,.0f} tokens/s, micro-batch of {config.training.batch_size}"
        if self.gpu and (peak := self.gpu.peak_tflops("bfloat16")):
            found += f", MFU {config.flops_per_token * rate / peak / 1e12:.1%}"
        report(f"{recipe}, width 768", found, self._expected_rate(recipe, config))
        return rate

    @property
    def _rates_file(self) -> Path:
        return self.folder / "tokens-per-second.json"

    def _expected_rate(self, recipe: str, config: RunConfig) -> str:
        if recipe == PLAIN or self.gpu is None or self.small:
            return ""
        estimate = nominal_throughput(config, self.gpu)
        return f"{estimate.slowest:,.0f} to {estimate.fastest:,.0f} tokens/s"

    def _time_plain(self, config: RunConfig) -> tuple[RunConfig, float]:
        """Return the plain loop's tokens per second, and the config with what fits into memory."""
        while True:
            points = self._plain_points(config)
            try:
                seconds = [next(points)[1] for _ in range(12)]
            except Exception as error:
                if not is_out_of_memory(error) or config.training.batch_size == 1:
                    raise
            else:
                steps = np.diff(seconds)[4:]  # without compiling and warm-up
                return config, config.tokens_per_step / statistics.median(steps)
            points.close()
            torch.cuda.empty_cache()
            training = config.training
            halves = {"batch_size": training.batch_size // 2, "grad_acc": training.grad_acc * 2}
            config = config.model_copy(update={"training": training.model_copy(update=halves)})

    def _plain_points(self, config: RunConfig) -> Iterator[tuple[int, float, float, float | None]]:
        from plain_loop import train_plain

        return train_plain(config, self.dataset, 6e-4, warmup=config.training.max_steps // 10)

    def check_equal_time(self) -> None:
        """Train each recipe for the same seconds, with a schedule that ends then."""
        for recipe, rate in json.loads(self._rates_file.read_text()).items():
            with guarded(f"{recipe}, width 768"):
                self._train_for(1.0 if self.small else 30.0, recipe, rate)

    def _train_for(self, seconds: float, recipe: str, rate: float) -> None:
        per_step = self._config(recipe, 768).tokens_per_step
        steps = max(4, min(10_000, round(seconds * rate / per_step)))
        changes = {"evaluation__interval": steps, "training__checkpoint_interval": steps}
        changes |= {"training__max_steps": steps, "training__spike_sigma": 0.0}
        config = self._config(recipe, 768, **changes)
        if recipe == PLAIN:
            *_, (_, taken, _, loss) = self._plain_points(config)
        else:
            records = list(train(config, self.dataset, self._new_folder() / "run"))
            rated = [r.tokens_per_second for r in records if r.tokens_per_second]
            taken = sum(per_step / rate for rate in rated)
            loss = records[-1].validation.loss if records[-1].validation else math.nan
        found = f"validation loss {loss:.4f} after {steps} steps in {taken:.0f} s"
        report(f"{recipe}, width 768", found, f"{seconds:.0f} s, and the time to compile")

    # --- the rest --------------------------------------------------------------------------------

    def check_launcher(self) -> None:
        from bench_launcher import by_launcher, directly, measure

        options = argparse.Namespace(
            steps=14 if self.small else 60,
            n_layer=1 if self.small else 4,
            n_embd=32 if self.small else 128,
            block_size=32 if self.small else 128,
            batch_size=4,
            device=str(self.device),
        )
        direct, launched = (measure(options, self.dataset, way) for way in (directly, by_launcher))
        found = f"{launched * 1e3:.2f} ms per step, {launched / direct - 1:+.1%}"
        report("one process by the launcher", found, f"{direct * 1e3:.2f} ms directly")

    def check_calibration(self) -> None:
        for measured in measure_card(self.device, self._new_folder(), is_small=self.small):
            for name, value, comparison in compare_measurement(measured, self.gpu):
                report(name.strip(), value, comparison)


def compare_losses(what: str, found: list[float], expected: list[float], bound: float) -> None:
    """Report the largest difference of losses in nats, of which a negative bound is the least."""
    if bound < 0:
        report(what, f"from {found[0]:.4f} to {expected[0]:.4f}", ok=found[0] + bound > expected[0])
        return
    same = len(found) == len(expected)
    worst = max((abs(a - b) for a, b in zip(found, expected, strict=False)), default=math.nan)
    text = f"{worst:.1e} nats apart, last loss {found[-1]:.4f}"
    report(what, text, f"at most {bound:g}, {expected[-1]:.4f}", ok=same and worst <= bound)


# --- tokens --------------------------------------------------------------------------------------


def write_word_dataset(folder: Path, text_bytes: int) -> None:
    """Tokenize Python code into its most frequent words, one id each; rarer ones share an id."""
    pieces = PIECES.findall("".join(read_code(text_bytes)))
    common = Counter(pieces).most_common(VOCABULARY - 2)
    ids = {piece: number for number, (piece, _) in enumerate(common, 1)}
    tokens = np.array([ids.get(piece, 0) for piece in pieces])
    folder.mkdir(parents=True, exist_ok=True)
    held_out = len(tokens) // 20
    parts = {"validation": tokens[:held_out], "train": tokens[held_out:]}
    write_manifest(
        DatasetManifest(
            fingerprint="f" * 64,
            folder=folder,
            tokenizer="words",
            ranks_sha256="",
            text_column="",
            validation_fraction=0.05,
            sources=(),
            skipped={},
            **{name: write_split(folder, name, part) for name, part in parts.items()},
        )
    )


def read_code(text_bytes: int) -> Iterator[str]:
    """Yield files of Python's library and of torch, mixed, up to a size."""
    folders = (Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent)
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    for index in np.random.default_rng(0).permutation(len(paths)):
        text = paths[index].read_text(encoding="utf-8", errors="ignore")
        yield text
        text_bytes -= len(text)
        if text_bytes < 0:
            return


def write_split(folder: Path, name: str, tokens: np.ndarray) -> Split:
    with ShardWriter(folder, name, 100_000_000) as writer:
        writer.write(tokens)
        shards = writer.close()
    return Split(shards=shards, documents=1, tokens=len(tokens), text_bytes=len(tokens))


if __name__ == "__main__":
    sys.exit("run gpu_check.py")

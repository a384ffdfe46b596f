"""What was measured on a GPU, beside its data sheet, estimates and published runs."""

from collections.abc import Iterator

from gpt.config.schema import RunConfig
from gpt.hardware.calibration import Measurement
from gpt.hardware.gpus import GPUSpec, read_rows
from gpt.preflight.checks import gib
from gpt.preflight.memory import estimate_memory
from gpt.preflight.time import nominal_throughput


def compare_measurement(
    measured: Measurement, gpu: GPUSpec | None
) -> Iterator[tuple[str, str, str]]:
    """Yield rows of name, measured value, and what others say of it, if they do."""
    value, expected = measured.value, ""
    sheet = {"TFLOP/s": gpu.tflops, "GB/s": gpu.bandwidth_gbs}.get(measured.unit) if gpu else None
    if sheet:
        expected = f"data sheet {sheet:g}: {value / sheet:.0%}"
    if measured.config and gpu:
        expected = "; ".join(_other_rates(measured.config, gpu))
    digits = ",.0f" if value >= 1000 else ".3g"
    yield measured.name, f"{value:{digits}} {measured.unit}", expected
    if measured.config and measured.peak_bytes:
        estimate = estimate_memory(measured.config, gpu=gpu).compiled_bytes
        yield "  its peak memory", gib(measured.peak_bytes), f"estimate {gib(estimate)}"


def _other_rates(config: RunConfig, gpu: GPUSpec) -> Iterator[str]:
    estimate = nominal_throughput(config, gpu)
    if estimate.tokens_per_second:
        yield f"estimate {estimate.slowest:,.0f} to {estimate.fastest:,.0f}"
    model = config.model.model_dump()
    for row in read_rows("measurements.csv"):
        same = ("architecture", "n_layer", "n_embd", "block_size")
        if row["gpu"] == gpu.key and all(row[key] == str(model[key]) for key in same):
            yield f"published {float(row['tokens_per_second']):,.0f}"

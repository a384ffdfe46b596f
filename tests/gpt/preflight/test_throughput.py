"""Hours: the fit to published runs, no contradiction between cards or shapes, and own runs."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpt.config.loading import load_config
from gpt.config.schema import RunConfig
from gpt.hardware.gpus import GPUS, GPUSpec, find_gpu, read_rows
from gpt.preflight.render import format_hours
from gpt.preflight.throughput import Shape, describe_shape, load_efficiency, step_seconds
from gpt.preflight.time import MeasuredPace, correct_throughput, nominal_throughput

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ("gpt-480", "gpt-576", "gpt-720", "gpt-768", "gpt-768-gpt2", "tiny")


def load(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / f"{name}.toml", list(overrides))


def get_gpu(name: str) -> GPUSpec:
    gpu = find_gpu(name)
    assert gpu is not None
    return gpu


def hours(config: RunConfig, gpu: str) -> float:
    rate = nominal_throughput(config, get_gpu(gpu)).tokens_per_second
    assert rate is not None
    return config.total_tokens / rate / 3600


# --- the fit -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitting() -> ModuleType:
    path = ROOT / "tests" / "benchmarks" / "fit_throughput.py"
    spec = importlib.util.spec_from_file_location("fit_throughput", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fitting_again_gives_the_stored_efficiencies_and_errors(fitting: ModuleType) -> None:
    values, _ = fitting.fit_all()
    assert values == pytest.approx(load_efficiency(), rel=1e-3)


def test_leave_one_out_error_is_under_a_fifth() -> None:
    efficiency = load_efficiency()
    assert efficiency["run_error"] < efficiency["card_error"] < 0.2


def test_every_measurement_names_a_known_gpu_and_its_source() -> None:
    rows = read_rows("measurements.csv")
    assert len(rows) > 35
    assert {row["gpu"] for row in rows} <= {gpu.key for gpu in GPUS}
    assert all(row["source"] and float(row["tokens_per_second"]) > 1000 for row in rows)


def test_published_run_on_the_same_shape_lies_in_the_range() -> None:
    pace = nominal_throughput(load("gpt-768-gpt2"), get_gpu("rtx-4070"))
    assert pace.slowest < 56_075 < pace.fastest


# --- no contradictions ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_card_that_is_no_worse_on_paper_is_never_slower(name: str, dtype: str) -> None:
    config = load(name, f"training.dtype={dtype}")
    rates = {
        gpu: rate
        for gpu in GPUS
        if (rate := nominal_throughput(config, gpu).tokens_per_second) is not None
    }
    assert len(rates) > 80
    for one, other in product(rates, rates):
        if (
            (one.peak_tflops(dtype) or 0) >= (other.peak_tflops(dtype) or 0)
            and one.bandwidth_gbs >= other.bandwidth_gbs
            and one.memory_bytes >= other.memory_bytes
        ):
            assert rates[one] >= rates[other] * (1 - 1e-12), (one.key, other.key)


def test_faster_cards_of_a_series_take_less() -> None:
    for config in (load("gpt-576"), load("gpt-768-gpt2")):
        series = ("rtx-4070", "rtx-4070-super", "rtx-4070-ti", "rtx-4070-ti-super", "rtx-4090")
        ordered = [hours(config, key) for key in series]
        assert ordered == sorted(ordered, reverse=True)
        assert hours(config, "rtx-5070") < hours(config, "rtx-4070")


def test_larger_shipped_configs_take_longer() -> None:
    for gpu in GPUS:
        if gpu.tflops:
            ordered = [hours(load(name), gpu.key) for name in SHIPPED[:4]]
            assert ordered == sorted(ordered)


SHAPES = st.builds(
    Shape,
    n_layer=st.integers(1, 48),
    n_head=st.sampled_from([1, 4, 12, 16]),
    n_embd=st.sampled_from([48, 240, 480, 576, 720, 768, 1536]),
    block_size=st.sampled_from([64, 128, 1024, 4096]),
    vocab_size=st.sampled_from([256, 32_768, 50_304]),
    batch_size=st.integers(1, 64),
    grad_acc=st.integers(1, 64),
    parameters=st.integers(10**6, 10**9),
    is_muon=st.booleans(),
    is_compiled=st.booleans(),
    is_checkpointed=st.booleans(),
)
GROWING = ("n_layer", "n_embd", "block_size", "vocab_size", "batch_size", "grad_acc", "parameters")


@given(SHAPES, st.sampled_from(GROWING), st.integers(1, 8), st.sampled_from(GPUS))
def test_more_tokens_parameters_or_context_never_take_less(
    shape: Shape, key: str, times: int, gpu: GPUSpec
) -> None:
    assume(gpu.tflops)
    assert gpu.tflops is not None
    larger = replace(shape, **{key: getattr(shape, key) * times})
    seconds = [step_seconds(s, gpu, gpu.tflops, load_efficiency()) for s in (shape, larger)]
    assert seconds[0] <= seconds[1]


def test_heads_that_attention_kernels_pad_take_longer() -> None:
    padded, unpadded = (
        load("gpt-576", "model.n_embd=480", f"model.n_head={heads}") for heads in (12, 15)
    )
    assert hours(padded, "rtx-4070") > hours(unpadded, "rtx-4070")


# --- ranges --------------------------------------------------------------------------------------


def test_range_is_wider_for_cards_without_published_runs() -> None:
    config = load("gpt-768")

    def width(key: str) -> float:
        pace = nominal_throughput(config, get_gpu(key))
        return pace.fastest / pace.slowest

    assert width("rtx-4070") < width("rtx-4070-super") < width("rtx-2080-ti")
    assert width("rtx-4070-laptop") > 1.2 * width("rtx-4070-super")  # power limits


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ((7.96, 9.97), "8 to 10 hours"),
        ((2.13, 2.64), "2.1 to 2.6 hours"),
        ((431.0, 847.0), "430 to 850 hours"),
        ((0.21, 0.34), "13 to 20 minutes"),
        ((8.01, 8.02), "8 hours"),
        (None, "n/a"),
    ],
)
def test_range_of_hours_has_two_digits(bounds: tuple[float, float] | None, text: str) -> None:
    assert format_hours(bounds) == text


def test_gpu_without_tensor_cores_has_no_hours() -> None:
    pace = nominal_throughput(load("gpt-768"), get_gpu("gtx-1660-ti"))
    assert pace.tokens_per_second is None
    assert "no tensor cores" in pace.basis


# --- own runs ------------------------------------------------------------------------------------


def test_own_runs_replace_the_model_by_number_and_agreement() -> None:
    config, gpu = load("gpt-768"), get_gpu("rtx-4070")
    model = nominal_throughput(config, gpu)
    assert model.tokens_per_second is not None
    measured = 0.8 * model.tokens_per_second

    def correct(*rates: float, steps: int = 1000) -> tuple[float, float]:
        shape = describe_shape(config)
        paces = [MeasuredPace(shape, rate, steps, "a run") for rate in rates]
        pace = correct_throughput(config, gpu, paces)
        assert pace.tokens_per_second is not None
        return pace.tokens_per_second, pace.fastest / pace.slowest

    none, few, one, three = (
        correct(),
        correct(measured, steps=2),
        correct(measured),
        correct(measured, measured, measured),
    )
    assert model.tokens_per_second == none[0] > few[0] > one[0] > three[0] > measured
    assert none[1] > few[1] > one[1] >= three[1]
    assert one[0] == pytest.approx(measured, rel=0.05)
    disagreeing = correct(0.6 * measured, 1.4 * measured, measured)
    assert disagreeing[1] > three[1]


def test_own_run_of_another_shape_corrects_by_its_ratio_to_the_model() -> None:
    small, large, gpu = load("gpt-480"), load("gpt-768"), get_gpu("rtx-4070")
    rates = [nominal_throughput(config, gpu).tokens_per_second for config in (small, large)]
    assert rates[0] is not None
    assert rates[1] is not None
    pace = MeasuredPace(describe_shape(small), 1.1 * rates[0], 1000, "a run")
    corrected = correct_throughput(large, gpu, [pace]).tokens_per_second
    assert corrected == pytest.approx(1.1 * rates[1], rel=0.02)

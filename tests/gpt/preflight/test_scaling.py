"""The preflight of several devices: memory per device, bytes sent, time, and the bottleneck."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gpt.config.loading import build_config, read_toml
from gpt.config.schema import RunConfig
from gpt.errors import ConfigError
from gpt.hardware import target_gpu
from gpt.hardware.gpus import GPUS, find_gpu
from gpt.hardware.interconnect import intra_node_link, network_link
from gpt.hardware.target_gpu import TargetGPU, find_target_gpu
from gpt.preflight.memory import choose_sharding, estimate_memory, resolve_sharding
from gpt.preflight.parameters import count_parameters
from gpt.preflight.render import render_markdown
from gpt.preflight.report import Report, run_preflight_on_values
from gpt.preflight.scaling import Scaling, estimate_scaling
from gpt.preflight.suggestions import apply_overrides

ROOT = Path(__file__).resolve().parents[3]
BASE = read_toml(ROOT / "configs" / "gpt-768.toml")
LARGE = {
    "model.n_layer": 32,
    "model.n_head": 32,
    "model.n_embd": 4096,
    "training.batch_size": 1,
    "evaluation.batch_size": 1,
    "training.activation_checkpointing": True,
    "optimizer.learning_rate": 1e-3,
}
"""About 7 x 10^9 parameters: 16 bytes of each exceed the memory of one GPU."""
H100_BYTES = 81_559 * 2**20
H100 = find_target_gpu("h100")
UNKNOWN = find_target_gpu("no-such-gpu")
FSDP = {"hardware.sharding": "fsdp"}


def on(devices: int, nodes: int = 1, **more: Any) -> dict[str, Any]:
    rendezvous = {"hardware.rendezvous": "first:29400"} if nodes > 1 else {}
    return {"hardware.devices": devices, "hardware.nodes": nodes, **rendezvous, **more}


def make_config(overrides: Mapping[str, Any]) -> RunConfig:
    return build_config(apply_overrides(BASE, overrides))


def make_report(overrides: Mapping[str, Any], gpu: str = "h100", gbit: float = 25.0) -> Report:
    return run_preflight_on_values(
        "x.toml", apply_overrides(BASE, overrides), find_target_gpu(gpu), network_gbit=gbit
    )


def make_scaling(
    overrides: Mapping[str, Any],
    gpu: str = "h100",
    gbit: float = 25.0,
    tokens_per_second: float = 1e6,
) -> Scaling:
    config = make_config(overrides)
    sharding = "fsdp" if config.hardware.sharding == "fsdp" else "ddp"
    scaling = estimate_scaling(config, sharding, find_gpu(gpu), tokens_per_second, gbit)
    assert scaling is not None
    return scaling


# --- one device ----------------------------------------------------------------------------------


def test_report_on_one_device_says_nothing_about_several() -> None:
    default, fsdp = make_report({}), make_report(FSDP, gbit=400)
    assert "scaling" not in default.as_json()
    assert render_markdown(default) == render_markdown(fsdp)
    assert "several devices" not in render_markdown(default).lower()


# --- bytes sent ----------------------------------------------------------------------------------


def test_ddp_all_reduces_gradients_once_per_step() -> None:
    scaling = make_scaling(on(8, 2))
    total = count_parameters(make_config({}).model).total
    assert scaling.micro_batches == 2
    assert scaling.sent_bytes == pytest.approx(2 * 15 / 16 * 4 * total)
    assert scaling.communication_seconds == pytest.approx(scaling.sent_bytes / 3.125e9)
    assert scaling.compute_seconds == pytest.approx(2 * 16 * 1024 / 1e6)
    without_overlap = scaling.compute_seconds + scaling.communication_seconds
    assert scaling.step_seconds[1] == pytest.approx(without_overlap)


def test_fsdp_gathers_blocks_twice_and_the_rest_once_per_micro_batch() -> None:
    scaling = make_scaling(on(8, 2, **FSDP))
    parameters = count_parameters(make_config({}).model)
    once = parameters.token_embedding + parameters.position_embedding + parameters.head
    gathered = 2 * (2 * (parameters.total - once) + once)
    assert scaling.sent_bytes == pytest.approx(
        15 / 16 * 4 * (gathered + parameters.total), rel=1e-3
    )


def test_slowest_link_of_the_ring_counts() -> None:
    assert make_scaling(on(8)).link.bytes_per_second == 450e9
    assert make_scaling(on(8, 2)).link.bytes_per_second == 25e9 / 8
    link = make_scaling(on(2, 2), gpu="rtx-4060", gbit=400).link
    assert link.name == "PCI Express 4 x8"
    assert link.bytes_per_second == pytest.approx(15.75e9, rel=1e-3)
    assert make_scaling(on(1, 2), gpu="rtx-4060", gbit=400).link == network_link(400)


def test_every_gpu_outside_a_laptop_has_a_link() -> None:
    without = {gpu.key for gpu in GPUS if intra_node_link(gpu) is None}
    laptops = ("Laptop", "Max-Q Design", "1650 Ti")
    assert without == {gpu.key for gpu in GPUS if any(name in gpu.name for name in laptops)}
    speeds = [link.bytes_per_second for gpu in GPUS if (link := intra_node_link(gpu))]
    assert 7e9 < min(speeds) < max(speeds) == 900e9


# --- time and the bottleneck ---------------------------------------------------------------------


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("gbit", [1.0, 10.0, 25.0, 100.0, 400.0, 3200.0])
def test_bounds_are_in_order_and_a_faster_network_is_not_slower(sharding: str, gbit: float) -> None:
    scaling = make_scaling(on(8, 2, **{"hardware.sharding": sharding}), gbit=gbit)
    faster = make_scaling(on(8, 2, **{"hardware.sharding": sharding}), gbit=2 * gbit)
    full, none = scaling.efficiency
    assert 0 < none < full <= 1
    assert scaling.compute_seconds <= scaling.step_seconds[0] < scaling.step_seconds[1]
    assert faster.step_seconds[1] < scaling.step_seconds[1]
    assert faster.step_seconds[0] <= scaling.step_seconds[0]
    assert scaling.is_network_bound == (full < 1) == (scaling.needed_factor > 1)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("gpu", "tokens_per_second"), [("h100", 1e6), ("rtx-4060", 1e6), ("t4", 3e6)]
)
@pytest.mark.parametrize("gbit", [1.0, 15.0, 20.0, 24.0, 400.0])
def test_network_bound_from_is_the_first_such_point(
    sharding: str, gpu: str, tokens_per_second: float, gbit: float
) -> None:
    def is_network_bound(devices: int, nodes: int) -> bool:
        more = {"hardware.sharding": sharding, "training.grad_acc": devices * nodes}
        scaling = make_scaling(on(devices, nodes, **more), gpu, gbit, tokens_per_second)
        return scaling.is_network_bound

    more = {"hardware.sharding": sharding, "training.grad_acc": 16}
    point = make_scaling(on(8, 2, **more), gpu, gbit, tokens_per_second).network_bound_from
    before = [(count, 1) for count in range(2, 9)] + [(8, nodes) for nodes in range(2, 40)]
    if point in before:
        before = before[: before.index(point)]
    assert point is None or is_network_bound(*point)
    assert not any(is_network_bound(*each) for each in before)


def test_suggested_micro_batch_or_network_gives_full_overlap() -> None:
    scaling = make_scaling(on(8, 2))
    assert scaling.is_network_bound
    size = -int(-16 * scaling.needed_factor // 1)
    assert not make_scaling(on(8, 2, **{"training.batch_size": size})).is_network_bound
    assert make_scaling(on(8, 2, **{"training.batch_size": size - 1})).is_network_bound
    assert not make_scaling(on(8, 2), gbit=25 * scaling.needed_factor * 1.001).is_network_bound


@pytest.mark.parametrize("gpu", ["rtx-4070-laptop", "rtx-4700"])
def test_unknown_link_or_throughput_gives_no_number(gpu: str) -> None:
    report = make_report(on(2), gpu=gpu)
    values = report.as_json()
    assert values["scaling"] is values["hours"] is values["tokens_per_second"] is None
    assert "n/a: throughput or interconnect" in render_markdown(report)


@pytest.mark.parametrize("gbit", [0.0, -1.0, float("nan"), float("inf")])
def test_invalid_network_speed_is_refused(gbit: float) -> None:
    with pytest.raises(ConfigError, match="--network-gbit"):
        make_report(on(8, 2), gbit=gbit)


# --- memory --------------------------------------------------------------------------------------


def test_ddp_needs_the_memory_of_one_device_that_accumulates_gradients() -> None:
    one = make_config({"training.grad_acc": 2})
    many = make_config(on(2, **{"training.grad_acc": 2}))
    assert estimate_memory(many, "ddp") == estimate_memory(one)
    single_micro_batch = estimate_memory(make_config({"training.grad_acc": 1}))
    assert estimate_memory(many, "ddp").peak_bytes > single_micro_batch.peak_bytes


def test_fsdp_needs_its_share_and_what_it_gathers() -> None:
    config = make_config(on(8, 2, **LARGE))
    parameters = count_parameters(config.model)
    ddp, fsdp = estimate_memory(config, "ddp"), estimate_memory(config, "fsdp")
    root = parameters.token_embedding + parameters.head
    blocks = parameters.total - root
    assert fsdp.parts["optimizer_states"] == -(-ddp.parts["optimizer_states"] // 16)
    assert fsdp.parts["weights"] == pytest.approx(
        4 * (parameters.total / 16 + root + 2 * blocks / 32)
    )
    # Two micro-batches are summed before gradients are reduced.
    assert fsdp.parts["gradients"] == ddp.parts["gradients"]
    once = estimate_memory(make_config(on(8, 2, **LARGE, **{"training.grad_acc": 16})), "fsdp")
    assert once.needed_bytes < fsdp.needed_bytes < ddp.needed_bytes


# --- the choice of sharding ----------------------------------------------------------------------


def test_auto_sharding_is_ddp_if_it_fits_or_memory_is_unknown_else_fsdp() -> None:
    assert choose_sharding(make_config(on(8, 2)), H100) == "ddp"
    assert choose_sharding(make_config(on(8, 2, **LARGE)), UNKNOWN) == "ddp"
    assert choose_sharding(make_config(on(8, 2, **LARGE)), H100) == "fsdp"
    assert choose_sharding(make_config(LARGE), H100) == "ddp"  # one device
    assert choose_sharding(make_config(on(8, 2, **FSDP)), UNKNOWN) == "fsdp"
    assert choose_sharding(make_config(on(8, 2, **FSDP)), H100) == "fsdp"
    report = make_report(on(8, 2, **LARGE))
    assert report.as_json()["scaling"]["sharding"] == "fsdp"
    assert report.as_json()["memory"]["fits"]
    assert "hardware.sharding" not in {problem.key for problem in report.problems}


def test_auto_sharding_is_resolved_for_the_gpus_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h100 = target_gpu.InstalledGPU("NVIDIA H100 80GB HBM3", H100_BYTES, H100_BYTES)
    monkeypatch.setattr(target_gpu, "installed_gpus", lambda: (h100,))
    large = make_config(on(8, 2, **LARGE))
    assert resolve_sharding(large).hardware.sharding == "fsdp"
    assert resolve_sharding(make_config(on(8, 2))).hardware.sharding == "ddp"
    on_cpu = make_config(on(8, 2, **LARGE, **{"hardware.device": "cpu"}))
    assert resolve_sharding(on_cpu).hardware.sharding == "ddp"
    monkeypatch.setattr(target_gpu, "installed_gpus", lambda: ())
    assert resolve_sharding(large).hardware.sharding == "ddp"
    assert resolve_sharding(make_config(on(2, **FSDP))).hardware.sharding == "fsdp"


def test_run_that_fits_in_no_way_is_refused_with_a_remedy() -> None:
    ddp = make_report(on(8, 2, **{"hardware.sharding": "ddp"}, **LARGE))
    assert ddp.problems[0].key == "hardware.sharding"
    assert 'set hardware.sharding to "auto"' in ddp.problems[0].remedy
    wide = on(2, **{"training.batch_size": 512}, **FSDP)
    report = make_report(wide)
    assert [problem.key for problem in report.problems] == ["hardware.sharding"]
    assert "each of 2" in report.problems[0].rule
    assert {choice.key for choice in report.suggestions} == {"hardware.sharding"}
    first = report.suggestions[0].overrides
    assert first["training.batch_size"] * first["training.grad_acc"] == 512 * 32
    assert first["training.grad_acc"] % 2 == 0
    assert not make_report({**wide, **first}).blocked
    large = make_report(on(2, **LARGE), gpu="rtx-3050-ti-laptop")
    assert "use more devices" in str(large.problems)


def test_starting_run_needs_its_devices_in_this_machine() -> None:
    raw = apply_overrides(BASE, on(8))
    here = TargetGPU("NVIDIA H100 80GB HBM3", find_gpu("h100"), H100_BYTES, installed=2)
    for starting in (True, False):
        problems = run_preflight_on_values("x.toml", raw, here, starting).problems
        assert ("hardware.devices" in {problem.key for problem in problems}) == starting


# --- the command ---------------------------------------------------------------------------------


def test_validate_answers_for_devices_given_as_options() -> None:
    program = (
        "import sys; from flows.cli.main import app\n"
        "arguments = sys.argv[1:]\n"
        "for more in ([], ['--json']):\n"
        "    sys.argv = ['overnight', 'validate', *arguments, *more]\n"
        "    try: app()\n"
        "    except SystemExit as end: print('exit', end.code)\n"
        "print('torch' in sys.modules)"
    )
    arguments = [
        *(str(ROOT / "configs" / "gpt-768.toml"), "--gpu", "h100"),
        *("--devices", "8", "--nodes", "2", "--network-gbit", "400"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    page, values, rest = done.stdout.split("exit 0")
    assert "2 machines x 8 h100 = 16, each 2 of 32 micro-batches per step" in page
    assert "400 Gbit/s network" in page
    assert "given by --network-gbit" in page
    scaling = json.loads(values)["scaling"]
    assert (scaling["devices"], scaling["nodes"], scaling["sharding"]) == (8, 2, "ddp")
    assert scaling["hours"]["hidden"] < scaling["hours"]["exposed"]
    assert json.loads(values)["hours"] == pytest.approx(scaling["hours"]["exposed"])
    assert rest.strip() == "False"

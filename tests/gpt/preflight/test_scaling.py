"""The preflight of many devices: memory of each, bytes sent, time, and where the links bind."""

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
from gpt.hardware.gpus import GPUS, find_gpu
from gpt.hardware.interconnect import intra_node_link, network_link
from gpt.preflight.layout import Layout
from gpt.preflight.memory import estimate_memory
from gpt.preflight.parameters import count_parameters
from gpt.preflight.render import render_markdown
from gpt.preflight.report import Report, run_preflight_on_values
from gpt.preflight.scaling import Scaling, estimate_scaling
from gpt.preflight.sharding import choose_sharding
from gpt.preflight.suggestions import apply_overrides
from gpt.preflight.target import TargetGPU, find_target_gpu

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
"""Some 7 x 10^9 parameters: 16 bytes of each are more than a card has."""
H100_BYTES = 81_559 * 2**20


def on(devices: int, nodes: int = 1, **more: Any) -> dict[str, Any]:
    meeting = {"hardware.rendezvous": "first:29400"} if nodes > 1 else {}
    return {"hardware.devices": devices, "hardware.nodes": nodes, **meeting, **more}


def config_of(overrides: Mapping[str, Any]) -> RunConfig:
    return build_config(apply_overrides(BASE, overrides))


def report_on(overrides: Mapping[str, Any], gpu: str = "h100", gbit: float = 25.0) -> Report:
    return run_preflight_on_values(
        "x.toml", apply_overrides(BASE, overrides), find_target_gpu(gpu), network_gbit=gbit
    )


def scaling_of(
    overrides: Mapping[str, Any], gpu: str = "h100", gbit: float = 25.0, pace: float = 1e6
) -> Scaling:
    config = config_of(overrides)
    hardware = config.hardware
    kind = "fsdp" if hardware.sharding == "fsdp" else "ddp"
    layout = Layout(hardware.devices * hardware.nodes, kind)
    found = estimate_scaling(config, layout, find_gpu(gpu), pace, gbit)
    assert found is not None
    return found


# --- one device ----------------------------------------------------------------------------------


def test_of_one_device_nothing_new_is_said() -> None:
    plain, asked = report_on({}), report_on({"hardware.sharding": "fsdp"}, gbit=400)
    assert "scaling" not in plain.as_json()
    assert render_markdown(plain) == render_markdown(asked)
    assert "many devices" not in render_markdown(plain).lower()


# --- what is exchanged ---------------------------------------------------------------------------


def test_ddp_sends_gradients_around_a_ring_once_a_step() -> None:
    found = scaling_of(on(8, 2))
    total = count_parameters(config_of({}).model).total
    assert found.micro_batches == 2
    assert found.exchange.sent_bytes == pytest.approx(2 * 15 / 16 * 4 * total)
    assert found.exchange.exchange_seconds == pytest.approx(found.exchange.sent_bytes / 3.125e9)
    assert found.exchange.compute_seconds == pytest.approx(2 * 16 * 1024 / 1e6)
    assert found.step_seconds_exposed == pytest.approx(
        found.exchange.compute_seconds + found.exchange.exchange_seconds
    )


def test_fsdp_gathers_blocks_twice_and_the_rest_once_for_every_micro_batch() -> None:
    found = scaling_of(on(8, 2, **{"hardware.sharding": "fsdp"}))
    parameters = count_parameters(config_of({}).model)
    once = parameters.token_embedding + parameters.position_embedding + parameters.head
    gathered = 2 * (2 * (parameters.total - once) + once)
    assert found.exchange.sent_bytes == pytest.approx(
        15 / 16 * 4 * (gathered + parameters.total), rel=1e-3
    )


def test_the_slowest_link_of_the_ring_counts() -> None:
    assert scaling_of(on(8)).exchange.link.bytes_per_second == 450e9
    assert scaling_of(on(8, 2)).exchange.link.bytes_per_second == 25e9 / 8
    fast = scaling_of(on(2, 2), gpu="rtx-4060", gbit=400).exchange.link
    assert fast.name == "PCI Express 4 x8"
    assert fast.bytes_per_second == pytest.approx(15.75e9, rel=1e-3)
    assert scaling_of(on(1, 2), gpu="rtx-4060", gbit=400).exchange.link == network_link(400)


def test_every_card_that_can_have_a_neighbour_has_a_link() -> None:
    without = {card.key for card in GPUS if intra_node_link(card) is None}
    assert without == {card.key for card in GPUS if "Laptop" in card.name}
    speeds = [link.bytes_per_second for card in GPUS if (link := intra_node_link(card))]
    assert 7e9 < min(speeds) < max(speeds) == 900e9


# --- the time and where it binds -----------------------------------------------------------------


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("gbit", [1.0, 10.0, 25.0, 100.0, 400.0, 3200.0])
def test_bounds_are_in_order_and_a_faster_network_is_no_slower(sharding: str, gbit: float) -> None:
    found = scaling_of(on(8, 2, **{"hardware.sharding": sharding}), gbit=gbit)
    faster = scaling_of(on(8, 2, **{"hardware.sharding": sharding}), gbit=2 * gbit)
    low, high = found.efficiency
    assert 0 < low < high <= 1
    assert found.exchange.compute_seconds <= found.step_seconds_hidden < found.step_seconds_exposed
    assert faster.step_seconds_exposed < found.step_seconds_exposed
    assert faster.step_seconds_hidden <= found.step_seconds_hidden
    assert found.exchange.binds == (high < 1) == (found.exchange.needed_factor > 1)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize(("gpu", "pace"), [("h100", 1e6), ("rtx-4060", 1e6), ("t4", 3e6)])
@pytest.mark.parametrize("gbit", [1.0, 15.0, 20.0, 24.0, 400.0])
def test_the_point_where_it_binds_is_the_first(
    sharding: str, gpu: str, pace: float, gbit: float
) -> None:
    def binds(devices: int, nodes: int) -> bool:
        world = devices * nodes
        asked = on(devices, nodes, **{"hardware.sharding": sharding, "training.grad_acc": world})
        return scaling_of(asked, gpu, gbit, pace).exchange.binds

    asked = on(8, 2, **{"hardware.sharding": sharding, "training.grad_acc": 16})
    point = scaling_of(asked, gpu, gbit, pace).binds_from
    before = [(count, 1) for count in range(2, 9)] + [(8, nodes) for nodes in range(2, 40)]
    if point in before:
        before = before[: before.index(point)]
    assert point is None or binds(*point)
    assert not any(binds(*each) for each in before)


def test_a_micro_batch_as_large_as_said_hides_it() -> None:
    found = scaling_of(on(8, 2))
    assert found.exchange.binds
    size = -int(-16 * found.exchange.needed_factor // 1)
    assert not scaling_of(on(8, 2, **{"training.batch_size": size})).exchange.binds
    assert scaling_of(on(8, 2, **{"training.batch_size": size - 1})).exchange.binds
    assert not scaling_of(on(8, 2), gbit=25 * found.exchange.needed_factor * 1.001).exchange.binds


@pytest.mark.parametrize("gpu", ["rtx-4070-laptop", "rtx-4700"])
def test_without_a_link_or_a_pace_there_is_no_number(gpu: str) -> None:
    report = report_on(on(2), gpu=gpu)
    values = report.as_json()
    assert values["scaling"] is values["hours"] is values["tokens_per_second"] is None
    assert "n/a: of this card" in render_markdown(report)


@pytest.mark.parametrize("gbit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_network_of_no_speed_is_refused(gbit: float) -> None:
    with pytest.raises(ConfigError, match="--network-gbit"):
        report_on(on(8, 2), gbit=gbit)


# --- memory --------------------------------------------------------------------------------------


def test_ddp_is_one_device_that_keeps_its_gradients() -> None:
    one, many = config_of({"training.grad_acc": 2}), config_of(on(2, **{"training.grad_acc": 2}))
    ddp = estimate_memory(many, Layout(2, "ddp"))
    assert ddp == estimate_memory(one)
    assert ddp.peak_bytes > estimate_memory(config_of({"training.grad_acc": 1})).peak_bytes


def test_fsdp_holds_its_share_and_what_it_gathers() -> None:
    config = config_of(on(8, 2, **LARGE))
    parameters = count_parameters(config.model)
    whole = estimate_memory(config, Layout(16, "ddp"))
    shared = estimate_memory(config, Layout(16, "fsdp"))
    root = parameters.token_embedding + parameters.head
    blocks = parameters.total - root
    assert shared.parts["optimizer_states"] == -(-whole.parts["optimizer_states"] // 16)
    assert shared.parts["weights"] == pytest.approx(
        4 * (parameters.total / 16 + root + 2 * blocks / 32)
    )
    # Two micro-batches each are summed before anything is exchanged.
    assert shared.parts["gradients"] == whole.parts["gradients"]
    once = estimate_memory(
        config_of(on(8, 2, **LARGE, **{"training.grad_acc": 16})), Layout(16, "fsdp")
    )
    assert once.needed_bytes < shared.needed_bytes < whole.needed_bytes


# --- the choice ----------------------------------------------------------------------------------


def test_auto_is_ddp_where_it_fits_or_nobody_knows_and_else_fsdp() -> None:
    assert choose_sharding(config_of(on(8, 2)), H100_BYTES) == "ddp"
    assert choose_sharding(config_of(on(8, 2, **LARGE)), None) == "ddp"
    assert choose_sharding(config_of(on(8, 2, **LARGE)), H100_BYTES) == "fsdp"
    assert choose_sharding(config_of(LARGE), H100_BYTES) == "ddp"  # one device
    asked = on(8, 2, **{"hardware.sharding": "fsdp"})
    assert choose_sharding(config_of(asked), None) == "fsdp"
    assert choose_sharding(config_of(asked), H100_BYTES) == "fsdp"
    report = report_on(on(8, 2, **LARGE))
    assert report.as_json()["scaling"]["sharding"] == "fsdp"
    assert report.as_json()["memory"]["fits"]
    assert "hardware.sharding" not in {problem.key for problem in report.problems}


def test_what_fits_in_no_way_is_refused_with_what_would() -> None:
    config = config_of(on(8, 2, **{"hardware.sharding": "ddp"}, **LARGE))
    with pytest.raises(ConfigError, match=r'set hardware\.sharding to "auto"'):
        choose_sharding(config, H100_BYTES)
    wide = on(2, **{"training.batch_size": 512, "hardware.sharding": "fsdp"})
    with pytest.raises(ConfigError, match="on each of 2 devices"):
        choose_sharding(config_of(wide), H100_BYTES)
    report = report_on(wide)
    assert [problem.key for problem in report.problems] == ["hardware.sharding"]
    assert {choice.key for choice in report.suggestions} == {"hardware.sharding"}
    first = report.suggestions[0].overrides
    assert first["training.batch_size"] * first["training.grad_acc"] == 512 * 32
    assert first["training.grad_acc"] % 2 == 0
    assert not report_on({**wide, **first}).blocked
    with pytest.raises(ConfigError, match="take more devices"):
        choose_sharding(config_of(on(2, **LARGE)), 2**30)


def test_a_run_that_starts_wants_its_devices_here() -> None:
    raw = apply_overrides(BASE, on(8))
    here = TargetGPU("NVIDIA H100 80GB HBM3", find_gpu("h100"), H100_BYTES, found=2)
    for starting in (True, False):
        problems = run_preflight_on_values("x.toml", raw, here, starting).problems
        assert ("hardware.devices" in {problem.key for problem in problems}) == starting


# --- the command ---------------------------------------------------------------------------------


def test_the_command_answers_for_devices_that_the_config_does_not_name() -> None:
    good = str(ROOT / "configs" / "gpt-768.toml")
    program = (
        "import sys; from flows.cli.main import app\n"
        "asked = sys.argv[1:]\n"
        "for more in ([], ['--json']):\n"
        "    sys.argv = ['overnight', 'validate', *asked, *more]\n"
        "    try: app()\n"
        "    except SystemExit as end: print('exit', end.code)\n"
        "print('torch' in sys.modules)"
    )
    asked = [good, "--gpu", "h100", "--devices", "8", "--nodes", "2", "--network-gbit", "400"]
    done = subprocess.run(
        [sys.executable, "-c", program, *asked], cwd=ROOT, capture_output=True, text=True
    )
    page, values, rest = done.stdout.split("exit 0")
    assert "2 machines x 8 h100 = 16, each 2 of 32 micro-batches a step" in page
    assert "network of 400 Gbit/s a machine" in page
    assert "as --network-gbit says" in page
    scaling = json.loads(values)["scaling"]
    assert (scaling["devices"], scaling["nodes"], scaling["sharding"]) == (8, 2, "ddp")
    assert scaling["hours"]["hidden"] < scaling["hours"]["exposed"]
    assert json.loads(values)["hours"] == pytest.approx(scaling["hours"]["exposed"])
    assert rest.strip() == "False"

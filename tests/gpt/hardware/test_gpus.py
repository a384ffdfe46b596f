"""The table of GPUs: every name finds its GPU and no other."""

import pytest

from gpt.hardware.gpus import GIB, GPUS, MIB, find_gpu


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("rtx-4070", "rtx-4070"),
        ("RTX 4070", "rtx-4070"),
        ("rtx4070", "rtx-4070"),
        ("4070", None),
        ("NVIDIA GeForce RTX 4070", "rtx-4070"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "rtx-4070-laptop"),
        ("NVIDIA GeForce RTX 4070 SUPER", "rtx-4070-super"),
        ("NVIDIA GeForce RTX 4070 Ti", "rtx-4070-ti"),
        ("rtx4070ti", "rtx-4070-ti"),
        ("rtx-4070-ti-super", "rtx-4070-ti-super"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx-4070-ti-super"),
        ("rtx 4090 mobile", "rtx-4090-laptop"),
        ("NVIDIA GeForce RTX 4090 D", "rtx-4090-d"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("h100-sxm", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie"),
        ("A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("Tesla T4", "t4"),
        ("NVIDIA T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("Quadro RTX 6000", "quadro-rtx-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000-server"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000-max-q"),
        ("NVIDIA GeForce RTX 2080 Super with Max-Q Design", "rtx-2080-super-max-q"),
        ("NVIDIA GeForce GTX 1660 Ti", "gtx-1660-ti"),
        ("NVIDIA A800-SXM4-80GB", "a100-80gb"),
        ("rtx-3060-8gb", "rtx-3060-8gb"),
        ("rtx-3060-24gb", None),
        ("rtx-3060-12gb", "rtx-3060"),
        ("rtx-4060-ti-16gb", "rtx-4060-ti-16gb"),
        ("GTX 1080 Ti", None),
        ("Apple M3", None),
        ("", None),
    ],
)
def test_name_finds_its_gpu_only(name: str, key: str | None) -> None:
    gpu = find_gpu(name)
    assert (gpu.key if gpu else None) == key


def test_every_gpu_is_found_by_its_key_and_by_torchs_name() -> None:
    for gpu in GPUS:
        assert find_gpu(gpu.key) is gpu
        assert find_gpu(gpu.name, gpu.memory_bytes) is gpu


def test_memory_decides_between_gpus_with_the_same_name() -> None:
    both = {"rtx-4060-ti": 8_188 * MIB, "rtx-4060-ti-16gb": 16_380 * MIB}
    for key, memory_bytes in both.items():
        gpu = find_gpu("NVIDIA GeForce RTX 4060 Ti", memory_bytes)
        assert gpu is not None
        assert gpu.key == key


# NVIDIA's own figures, dense with float32 accumulation; sources in the module's docstring.
@pytest.mark.parametrize(
    ("key", "tflops"),
    [
        ("rtx-3090", 71.0),
        ("rtx-4070", 58.3),
        ("rtx-4080", 97.5),
        ("rtx-4090", 165.2),
        ("rtx-5090", 209.5),
        ("a100", 312.0),
        ("h100", 989.4),
    ],
)
def test_formula_gives_nvidias_figures(key: str, tflops: float) -> None:
    gpu = find_gpu(key)
    assert gpu is not None
    assert gpu.peak_tflops("bfloat16") == pytest.approx(tflops, rel=0.003)


def test_gpus_without_bfloat16_use_the_peak_of_float16() -> None:
    old = find_gpu("t4")
    new = find_gpu("rtx-4090")
    assert old is not None
    assert new is not None
    assert not old.has_bfloat16
    assert new.has_bfloat16
    assert old.peak_tflops("bfloat16") == old.peak_tflops("float16") == 65.0
    assert old.peak_tflops("float32") is None
    assert new.peak_tflops("float32") == pytest.approx(82.6, rel=0.001)


def test_table_is_plausible() -> None:
    keys = [gpu.key for gpu in GPUS]
    assert len(keys) == len(set(keys)) > 120
    for gpu in GPUS:
        assert 4 * GIB <= gpu.memory_bytes <= 192 * GIB
        assert 128 <= gpu.bandwidth_gbs <= 8000
        assert gpu.tflops is None or gpu.tflops > 10
        assert (gpu.low_tflops is not None) == gpu.name.endswith("Laptop GPU")
        assert gpu.low_tflops is None or gpu.low_tflops < (gpu.tflops or 0)
        assert (gpu.lanes is None) >= gpu.name.endswith("Laptop GPU")
        assert gpu.source


def test_geforce_has_the_tensor_cores_of_its_multiprocessors() -> None:
    for gpu in GPUS:
        if "GeForce" in gpu.name and gpu.tflops:
            per_sm = 8 if gpu.compute_capability == (7, 5) else 4
            assert gpu.source.startswith(f"{gpu.sms * per_sm} tensor cores x ")

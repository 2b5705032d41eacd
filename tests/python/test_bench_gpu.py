"""`tutelage bench kernels --device cuda` and the GPU report; here on the emulator, where nothing is timed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tutelage import devices
from tutelage.bench import KernelsConfig, gpu, gpu_report, run


def test_gpus_are_known_by_their_whole_names() -> None:
    def tflops(name: str) -> float | None:
        peak = gpu.peak_of(name)
        return None if peak is None else peak.tflops

    names = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA L4": 121, "NVIDIA L40S": 362, "NVIDIA L400": None}
    assert {name: tflops(name) for name in names} == names


def test_what_a_gpu_would_be_measured_by_is_checked_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = run(KernelsConfig(device="cuda-sim", json=tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(told))
    assert {result["kernel"] for result in told["results"]} == set(gpu.SHAPES) == set(gpu.SMALL_SHAPES)
    for result in told["results"]:
        assert result["microseconds"] == {} and result["rate"] is None and result["ratios"] == {}
        assert 0 <= max(result["errors"]) <= 2
    assert "not timed" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_measured() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16()

    def case(mine: Tensor) -> gpu.Case:
        return gpu.Case("twice", "forward", "100", "GB/s", 400.0, lambda: (mine,), lambda a: (a * 1.7 + 0.3,), (x,))

    (quotient,) = gpu.errors(case((x.float() * 1.7 + 0.3).bfloat16()))
    assert quotient < 1
    with pytest.raises(gpu.WrongResultError, match=r"twice forward 100: the error of output 0 is .*; at most twice is allowed"):
        gpu.errors(case((x.float() * 1.7 + 0.32).bfloat16()))
    with pytest.raises(gpu.WrongResultError, match="is nan"):
        gpu.errors(case(torch.full_like(x, math.nan)))


def test_times_of_a_gpu_become_rates_fractions_and_ratios() -> None:
    x = torch.ones(8).bfloat16()

    def ours() -> tuple[Tensor, ...]:
        return (x * 2,)

    case = gpu.Case("twice", "forward", "8", "GB/s", 3e6, ours, lambda a: (a * 2,), (x,))
    order: list[str] = []

    def timer(run: Any) -> float:
        order.append("ours" if run is ours else "torch")
        return 2.0 if run is ours else 5.0

    result = gpu.measure(case, timer, 3, gpu.Peak(tflops=100, gigabytes=3000))
    assert order == ["ours", "torch"] * 4
    assert result.rate == pytest.approx(1500) and result.fraction == pytest.approx(0.5)
    assert result.ratios["torch"].median == 2.5 and result.microseconds["ours"].high == 2.0
    flops = gpu.measure(dataclasses.replace(case, unit="TFLOP/s", work=4e8), timer, 1, gpu.Peak(tflops=400, gigabytes=1))
    assert flops.rate == pytest.approx(200) and flops.fraction == pytest.approx(0.5)
    assert gpu.measure(case, timer, 1, None).fraction is None


def test_the_report_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cuda-sim", "--output", str(tmp_path)]
    monkeypatch.setattr(gpu, "SMALL_SHAPES", {"swiglu": [(9, 48)]})
    assert gpu_report.main(arguments) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["checks"]) == 18 and report["failures"] == report["left_out"] == report["speeds"] == []
    assert [result["phase"] for result in report["kernels"]] == ["forward", "backward"]
    assert "18 checks hold, 0 things are wrong" in (tmp_path / "report.txt").read_text()

    assert gpu_report.main([*arguments, "--seconds", "0"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["left_out"] == [
        "the checks of llama",
        "the checks of gpt2",
        "swiglu forward 9×48",
        "swiglu backward 9×48",
    ]

    monkeypatch.setattr(gpu_report, "model_checks", lambda kind, device, long: iter([(f"{kind} is round", kind == "gpt2")]))
    assert gpu_report.main(arguments) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == ["llama is round"] and report["checks"] == ["gpt2 is round"]
    assert "llama is round" in capsys.readouterr().out


def test_a_report_of_a_gpu_that_is_not_there_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "problem", lambda name: "there is no NVIDIA driver")
    assert gpu_report.main(["--output", str(tmp_path)]) == 2
    assert "device 'cuda' does not work here: there is no NVIDIA driver" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="device 'cuda' does not work here: there is no NVIDIA driver"):
        run(KernelsConfig(device="cuda"))
    with pytest.raises(ValueError, match="there is no kernel 'sofa' to measure; there are matmul"):
        run(KernelsConfig(device="cuda-sim", only=("sofa",)))

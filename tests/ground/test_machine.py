"""What a figure was measured on is read from the machine, and what the machine does not tell is said to be assumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_freeze.machine import Hardware, _cpu_watts, _gpu_watts, library_versions, read_hardware, reset_peak


def zone(powercap: Path, name: str, kind: str, microwatts: str | None) -> None:
    """A RAPL zone as the Linux kernel shows it."""
    (powercap / name).mkdir()
    (powercap / name / "name").write_text(f"{kind}\n")
    if microwatts:
        (powercap / name / "constraint_0_power_limit_uw").write_text(microwatts)


def test_the_cpus_limit_is_that_of_all_packages_or_unknown(tmp_path: Path) -> None:
    assert _cpu_watts(tmp_path) is None
    zone(tmp_path, "intel-rapl:0", "package-0", "205000000\n")
    zone(tmp_path, "intel-rapl:0:0", "dram", "30000000\n")
    assert _cpu_watts(tmp_path) == 205.0
    zone(tmp_path, "intel-rapl:1", "package-1", "195000000\n")
    assert _cpu_watts(tmp_path) == 400.0
    zone(tmp_path, "intel-rapl:2", "package-2", None)  # one that does not tell
    assert _cpu_watts(tmp_path) is None


def test_a_gpus_limit_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert _gpu_watts("") is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho 700.00\n')
    tool.chmod(0o755)
    assert _gpu_watts("12ab") == 700.0
    assert (tmp_path / "asked").read_text().split() == [
        "--query-gpu=power.limit", "--format=csv,noheader,nounits", "--id=GPU-12ab",
    ]  # fmt: skip
    tool.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert _gpu_watts("12ab") is None
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert _gpu_watts("12ab") is None


def test_the_hardware_of_a_cpu_run_is_one_machine_whatever_its_processes() -> None:
    hardware = read_hardware("cpu", processes=4)
    assert hardware.devices == 1
    assert hardware.device
    assert Hardware(**hardware.to_dict()) == hardware


def test_a_cpu_that_tells_no_limit_is_given_an_assumed_power_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hf_freeze.machine.POWERCAP", tmp_path)
    hardware = read_hardware("cpu")
    assert hardware.watts == 12.0 * hardware.cores
    told = hardware.energy_text(3600.0)
    assert told.startswith("about ")
    assert "assumed: 12 W a core, since this machine tells no limit" in told
    assert "Not measured" in told

    zone(tmp_path, "intel-rapl:0", "package-0", "90000000\n")
    told = read_hardware("cpu").energy_text(3600.0)
    assert told.startswith("at most 90 Wh: 90 W (long-term power limit of the CPU packages, from RAPL) x 3,600 s.")


def test_a_power_that_nobody_knows_gives_no_energy() -> None:
    assert Hardware("an accelerator", 1, 2).energy_text(60.0) == ""


def test_only_libraries_that_are_installed_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_freeze.machine.LIBRARIES", ("torch", "no-such-library"))
    assert list(library_versions()) == ["python", "hf_freeze", "torch"]


def test_a_peak_that_cannot_be_reset_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hf_freeze.machine.sys.platform", "linux")
    monkeypatch.setattr("hf_freeze.machine.CLEAR_REFS", tmp_path / "clear_refs")
    assert reset_peak(torch.device("cpu")) is True
    assert (tmp_path / "clear_refs").read_text() == "5"
    monkeypatch.setattr("hf_freeze.machine.CLEAR_REFS", tmp_path / "not" / "there")
    assert reset_peak(torch.device("cpu")) is False

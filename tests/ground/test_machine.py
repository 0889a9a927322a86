"""What a figure was measured on is read from the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_freeze.machine import Hardware, library_versions, read_hardware, reset_peak


def test_the_hardware_of_a_cpu_run_is_one_machine_whatever_its_processes() -> None:
    hardware = read_hardware("cpu", processes=4)
    assert hardware.devices == 1
    assert hardware.device
    assert Hardware.from_dict(hardware.to_dict()) == hardware
    assert Hardware.from_dict(hardware.to_dict() | {"watts": 90.0}) == hardware, "as an earlier version wrote it"


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

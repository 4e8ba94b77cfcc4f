"""Process-wide settings of torch: determinism with and without torch's compiler, restored at the end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from clframe.seeding import torch_settings

VARIABLE = "TORCHINDUCTOR_DETERMINISTIC"


def _state() -> tuple[bool, bool, str | None]:
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return enabled, warns, os.environ.get(VARIABLE)


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_determinism_without_the_compiler_is_set_and_restored(monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    monkeypatch.delitem(sys.modules, "torch._inductor.config", raising=False)
    if before is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, before)
    torch.set_deterministic_debug_mode("warn")
    try:
        with torch_settings(deterministic=True):
            assert _state() == (True, False, "1")
            with torch_settings(deterministic=False):
                assert _state() == (False, False, None)
            assert _state() == (True, False, "1")
        assert _state() == (True, True, before)
        with torch_settings(threads=1):
            assert _state() == (True, True, before)
    finally:
        torch.set_deterministic_debug_mode("default")
    assert "torch._inductor.config" not in sys.modules


@pytest.mark.slow
def test_the_compiler_is_deterministic_whenever_it_is_imported() -> None:
    code = """
import sys
from clframe.seeding import torch_settings
with torch_settings(deterministic=True):
    assert "torch._inductor.config" not in sys.modules
    import torch._inductor.config as compiler
    assert compiler.deterministic is True
assert compiler.deterministic is False
with torch_settings(deterministic=True):
    assert compiler.deterministic is True
assert compiler.deterministic is False
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr

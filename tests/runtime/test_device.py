"""Device choice, the machine's description, and the memory watch."""

import json
import subprocess
import sys

import pytest
import torch

from worldenv import _C
from worldenv.runtime import device
from worldenv.runtime.errors import UserError


def test_pick():
    assert device.pick("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert device.pick().type == expected
    with pytest.raises(UserError, match="Unknown device 'gpu0'"):
        device.pick("gpu0")
    with pytest.raises(UserError, match="not supported"):
        device.pick("meta")
    with pytest.raises(UserError, match="cuda:99"):
        device.pick("cuda:99")


def test_describe_is_json_and_complete():
    machine = json.loads(json.dumps(device.describe()))
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > 1 << 28
    assert machine["torch"] == torch.__version__
    assert machine["cpu"]
    assert machine["python"] == sys.version.split()[0]


def test_cpu_features_agree_with_the_kernel():
    """What cpuid reports is what Linux lists; the extension answers without loading a tensor op."""
    features = _C.cpu_features()
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(line for line in file if line.startswith("flags")).split()
    except (OSError, StopIteration):
        pytest.skip("no x86 /proc/cpuinfo")
    assert features, "x86-64 but no features"
    for name, found in features.items():
        assert found == (name in flags), name
    assert _C.build_info()["cuda"] == (torch.version.cuda is not None)


def test_autocast_only_where_bfloat16_is_native():
    features = device.cpu_features()
    native = features.get("avx512_bf16") or features.get("amx_bf16")
    assert device.autocast_dtype("cpu") == (torch.bfloat16 if native else torch.float32)


PEAK_MEMORY = """
import subprocess, sys
import numpy as np
from worldenv.runtime import device
before = device.resident_bytes()
with device.PeakMemory(interval=0.02) as peak:
    block = np.ones(60_000_000 // 8)
    code = "x = bytearray(b'1' * 80_000_000); print('up', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "up\\n"
    peak._sample()
    child.communicate("\\n")
    del block
print(before, peak.bytes, device.resident_bytes())
"""


def test_peak_memory_sees_this_process_and_its_children():
    """In a process of its own: what other tests left in this one may be freed meanwhile."""
    found = subprocess.run([sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    before, peak, after = map(int, found.stdout.split())
    assert peak - before > 135_000_000
    assert after < peak - 135_000_000

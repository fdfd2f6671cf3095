"""What a process that labels loads, and what it does not."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import imgcls.inference.stages, imgcls.models.classifier, imgcls.models.zoo
assert "torchvision" in sys.modules
assert "torch._dynamo" not in sys.modules and "torch._dynamo.utils" not in sys.modules

import torch, torchvision
features = torch.arange(64.0).reshape(1, 1, 8, 8)
boxes = torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]])
print(torchvision.ops.roi_align(features, boxes, 2).shape)
torch.use_deterministic_algorithms(True)
from imgcls.data.decoding.lazy_torchvision import is_compile_supported
import torch._dynamo.utils
assert is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu")
double = torch.compile(lambda x: x + x, backend="eager")
print(double(torch.ones(2)).tolist())
"""


def test_the_compiler_is_loaded_when_it_is_used_and_not_before() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["torch.Size([1, 1, 2, 2])", "[2.0, 2.0]"]

"""Loading a network for PyTorch: no random numbers for weights that are replaced."""

from __future__ import annotations

import pytest
import torch

from imgcls.models import zoo
from imgcls.models.torch_engine import SkipRandomWeights


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "small_cnn"])
def test_no_random_numbers_are_drawn_for_weights_that_are_replaced(name: str) -> None:
    architecture = zoo.resolve_architecture(name)
    before = torch.get_rng_state()
    with SkipRandomWeights():
        network = zoo.build_network(architecture, 10)
    assert torch.equal(torch.get_rng_state(), before)
    state = {key: torch.full_like(value, 2) for key, value in network.state_dict().items()}
    network.load_state_dict(state)
    assert all((value == 2).all() for value in network.parameters())


def test_other_tensors_are_still_random() -> None:
    torch.manual_seed(0)
    right = torch.empty(3).uniform_()
    torch.manual_seed(0)
    with SkipRandomWeights():
        found = torch.empty(3).uniform_()
    assert torch.equal(found, right)

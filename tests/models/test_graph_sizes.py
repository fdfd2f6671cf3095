"""Which captured forward pass a batch runs in."""

from __future__ import annotations

import pytest
import torch

from imgcls.models.graph_sizes import SizedForward, choose_graph_sizes


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (2, (1, 2)), (4, (1, 4)), (16, (1, 4, 16)), (24, (1, 4, 16, 24))],
)
def test_the_sizes_rise_by_four_up_to_the_largest_batch(most: int, sizes: tuple[int, ...]) -> None:
    assert choose_graph_sizes(most) == sizes


@pytest.mark.parametrize(
    ("count", "expected"), [(1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (17, 16)]
)
def test_a_batch_runs_in_the_smallest_graph_that_holds_it(count: int, expected: int) -> None:
    forward = SizedForward({size: lambda inputs, size=size: inputs * size for size in (16, 1, 4)})
    assert forward(torch.ones(count, 2)).tolist() == [[expected, expected]] * count

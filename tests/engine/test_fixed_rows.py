"""Linear layers that always multiply the same number of rows: other bits for no batch, whatever the kernel below."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baton.engine.fixed_rows import FixedRowsLinear, rows_are_fixed
from baton.engine.linear import Linear

_CPU = torch.device("cpu")


class Fickle:
    """A layer whose bits depend on the number of rows, as those of a library may that picks kernels by size."""

    in_features, out_features, dtype = 6, 4, torch.float32

    def __init__(self, *, by_place: bool = False) -> None:
        self.sizes: list[int] = []
        self._by_place = by_place
        self._weight = torch.randn((4, 6), generator=torch.Generator().manual_seed(1))

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape[0])
        places = torch.arange(x.shape[0]).unsqueeze(1) % 7 if self._by_place else x.shape[0]
        # Broadcast products and sums of one order: nothing else depends on the number of rows.
        return (x.unsqueeze(1) * self._weight).sum(-1) * (1 + 1e-6 * places)


@pytest.mark.parametrize("count", [0, 1, 5, 8, 9, 16, 21])
def test_pieces_of_one_size(count: int) -> None:
    local = Fickle()
    linear = FixedRowsLinear(local, 8)
    x = torch.randn((count, 6), generator=torch.Generator().manual_seed(2))
    out = linear(x)
    assert out.shape == (count, 4)
    assert set(local.sizes) == {8}
    assert all(torch.equal(linear(x[row : row + 1])[0], out[row]) for row in range(count))


def test_whether_it_holds_is_looked_at() -> None:
    assert rows_are_fixed(FixedRowsLinear(Fickle(), 8), _CPU, 8)
    assert not rows_are_fixed(Fickle(), _CPU, 8)
    assert not rows_are_fixed(FixedRowsLinear(Fickle(by_place=True), 8), _CPU, 8)


def test_products_are_those_of_the_layer() -> None:
    weight = torch.randn((5, 6), generator=torch.Generator().manual_seed(3))
    local = Linear(weight, torch.ones(5))
    x = torch.randn((11, 6), generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(FixedRowsLinear(local, 4)(x), x @ weight.T + 1)

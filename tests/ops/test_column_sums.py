"""Sums over partial sums: in one launch or two, to one result or three."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def sums_of(partials: Tensor, n_results: int = 1) -> list[Tensor]:
    from fastguard.kernels.column_sums import column_sums

    shape = (partials.shape[0] // n_results, partials.shape[2])
    results = [torch.empty(shape, device=partials.device) for _ in range(n_results)]
    column_sums(partials, results)
    return results


def make(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("n_results", [1, 2, 3])
@pytest.mark.parametrize(("n_partials", "n_columns"), [(1, 1), (72, 96), (128, 32), (129, 40), (300, 7)])
def test_every_sum_goes_to_its_place(n_partials, n_columns, n_results, kernel_device, poisoned) -> None:
    partials = make(2 * n_results, n_partials, n_columns, device=kernel_device)
    got = torch.cat(sums_of(partials, n_results)).cpu().double()
    torch.testing.assert_close(got, partials.cpu().double().sum(1), rtol=1e-5, atol=1e-5)


def test_more_partial_sums_than_two_launches_take(kernel_device, poisoned) -> None:
    partials = make(1, 128 * 128 + 1, 2, device=kernel_device)
    (got,) = sums_of(partials)
    torch.testing.assert_close(got.cpu().double(), partials.cpu().double().sum(1), rtol=1e-4, atol=1e-3)


def test_strides_and_sums_of_nothing(kernel_device, poisoned) -> None:
    partials = make(2, 150, 3, 20, device=kernel_device)[:, :, 1]
    (got,) = sums_of(partials)
    assert torch.equal(got, sums_of(partials.contiguous())[0])
    (nothing,) = sums_of(torch.empty(2, 0, 5, device=kernel_device))
    assert torch.equal(nothing.cpu(), torch.zeros(2, 5))


def test_a_sum_does_not_depend_on_those_beside_it(kernel_device) -> None:
    partials = make(3, 200, 24, device=kernel_device)
    (together,) = sums_of(partials)
    alone = [sums_of(partials[i : i + 1])[0] for i in range(3)]
    assert torch.equal(together, torch.cat(alone))

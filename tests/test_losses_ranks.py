"""The loss of samples that are divided among ranks is that of one process which has them all."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from in_ranks import in_ranks
from test_losses import volume

from pipeline import distributed
from pipeline.training.loss import SegmentationLoss

IGNORED = 255
NAMES = ("batch_dice", "include_background", "class_weights", "ignore_value", "is_deep")
GRID = [  # with a number `smooth` that matters: without it Dice does not tell sums from means
    dict(zip(NAMES, row, strict=True)) | {"smooth": 2.0}
    for row in itertools.product(
        (False, True), (True, False), (None, [0.2, 1.0, 3.5]), (None, IGNORED), (False, True)
    )
]
SHARES = [(2, 1), (1, 3, 1), (2, 0, 1)]  # samples of each rank


def batch(size, ignore_value=None, is_deep=False):
    """Logits of each level, and a label of which a part and all of the last sample is ignored."""
    logits, label = volume(size, 6, 4, 8)
    if ignore_value is not None:
        label[0, :, :3] = label[-1] = ignore_value
    return [logits, volume(size, 3, 2, 4, seed=1)[0]][: 1 + is_deep], label


def own(tensors, shares):
    """The part of each tensor that belongs to this rank."""
    return [tensor.split(shares)[distributed.rank()] for tensor in tensors]


def value_and_gradients(function, levels, label):
    leaves = [level.detach().clone().requires_grad_() for level in levels]
    value = function(leaves, label)
    return value.item(), torch.autograd.grad(value, leaves)


def whole(options, size):
    """Value and gradients of one process."""
    options = dict(options)
    levels, label = batch(size, options["ignore_value"], options.pop("is_deep"))
    return value_and_gradients(SegmentationLoss(**options), levels, label)


def divided(shares):
    """Of each setting, value and gradients in this rank."""
    results = []
    for options in map(dict, GRID):
        levels, label = batch(sum(shares), options["ignore_value"], options.pop("is_deep"))
        *levels, label = own([*levels, label], shares)
        value, gradients = value_and_gradients(SegmentationLoss(**options), levels, label)
        results.append((value, [gradient.numpy() for gradient in gradients]))
    return results


@functools.cache
def results_of(shares):
    results = in_ranks(divided, shares, size=len(shares))
    if errors := [result for result in results if isinstance(result, BaseException)]:
        raise errors[0]
    return results


@pytest.mark.parametrize("number", range(len(GRID)), ids=lambda number: str(GRID[number]))
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_each_rank_has_the_value_of_all_and_the_gradient_of_its_own(shares, number):
    expected, in_one_process = whole(GRID[number], sum(shares))
    of_ranks = [results[number] for results in results_of(shares)]
    values = [value for value, _ in of_ranks]
    assert values == [values[0]] * len(shares)
    assert values[0] == pytest.approx(expected, rel=1e-6)
    for level, whole_gradient in enumerate(in_one_process):
        parts = [torch.from_numpy(gradients[level]) for _, gradients in of_ranks]
        assert [len(part) for part in parts] == list(shares)
        error = (torch.cat(parts) - whole_gradient).abs().max()
        assert error <= 1e-6 * whole_gradient.abs().max()


def collectives(num_levels):
    """How many a forward and a backward pass make."""
    levels = [volume(1, *(8 // 2**i,) * 3)[0].requires_grad_() for i in range(num_levels)]
    made, add_up = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (made.append(1), add_up(*args, **kwargs))[1]
    value = SegmentationLoss()(levels, volume(1, 8, 8, 8)[1])
    forward = len(made)
    value.backward()
    return forward, len(made) - forward


@pytest.mark.parametrize("num_levels", [1, 3])
def test_ranks_add_up_once_a_forward_pass_however_many_levels(num_levels):
    assert in_ranks(collectives, num_levels) == [(1, 0)] * 2

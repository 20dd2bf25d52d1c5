"""From a preprocessed image to labels on the file's grid."""

import logging

import numpy as np
import pytest
import torch
from monai.data import list_data_collate
from monai.inferers import sliding_window_inference
from test_postprocess import AFFINES, expected, grid_of

from pipeline.precision import Precision
from pipeline.prediction.segmenter import PredictionError, Segmenter, SlidingWindowLabels
from pipeline.prediction.sliding_window import SlidingWindow
from transforms.postprocess import ToOriginalGridd, to_original_grid

ROI = (8, 8, 8)
FLOAT32 = Precision("cpu", amp=False)


class Net(torch.nn.Conv3d):
    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__(3, 4, 3, padding=1)
        torch.nn.init.normal_(self.weight, std=0.6)


def probabilities_of(network, volume):
    with torch.no_grad():
        logits = sliding_window_inference(
            volume.as_tensor()[None], ROI, 4, network, 0.5, "gaussian"
        )
    return torch.softmax(logits[0], dim=0)


@pytest.fixture(params=AFFINES.values(), ids=AFFINES)
def affine(request):
    return request.param


def test_labels_are_those_of_whole_volume_blending(affine, monkeypatch):
    monkeypatch.setattr("pipeline.prediction.sliding_window.CHUNK_BYTES", 5_000)
    volume, own = grid_of(affine)
    network = Net()
    segmenter = Segmenter([network], FLOAT32, SlidingWindow(ROI, 4))
    found = segmenter(volume, with_probabilities=True)
    whole = to_original_grid(probabilities_of(network, volume), volume)
    assert found.labels.dtype == np.uint8
    np.testing.assert_array_equal(found.labels, whole.argmax(0))
    np.testing.assert_array_equal(found.labels, found.probabilities.argmax(0))
    assert len(np.unique(found.labels)) == 4
    by_scipy = expected(probabilities_of(network, volume), own, affine)
    np.testing.assert_allclose(found.probabilities, by_scipy, atol=1e-5)


def test_probabilities_outside_of_what_was_kept_are_background():
    volume, _ = grid_of(AFFINES["RAS"], ([2, 3, 1], [6, 5, 9]))
    network = Net()
    torch.nn.init.constant_(network.bias, 0)
    network.bias.data[2] = 99
    found = Segmenter([network], FLOAT32, SlidingWindow(ROI, 4))(volume, with_probabilities=True)
    np.testing.assert_allclose(found.probabilities.sum(0), 1, atol=1e-5)
    inside = np.zeros(found.labels.shape, bool)
    inside[2:8, 3:8, 1:10] = True
    np.testing.assert_array_equal(found.labels == 2, inside)
    np.testing.assert_array_equal(found.labels == 0, ~inside)


def test_network_is_evaluated_and_not_trained():
    volume, _ = grid_of(AFFINES["RAS"])
    network = torch.nn.Sequential(torch.nn.Dropout(0.9), Net())
    network.train()
    segmenter = Segmenter([network], FLOAT32, SlidingWindow(ROI, 4))
    np.testing.assert_array_equal(segmenter(volume).labels, segmenter(volume).labels)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value):
    volume, _ = grid_of(AFFINES["RAS"])
    network = Net()
    network.bias.data[1] = value
    with pytest.raises(PredictionError, match="expected finite logits in float32, got NaN or inf"):
        Segmenter([network], FLOAT32, SlidingWindow(ROI, 4))(volume)


def as_batch(*volumes):
    """Preprocessed cases as an evaluator gets them."""
    return list_data_collate([{"image": volume} for volume in volumes])["image"]


def test_labels_in_an_evaluator_are_the_segmenters():
    volumes = [grid_of(affine)[0] for affine in (AFFINES["oblique"], AFFINES["permuted"])]
    network = Net()
    inferer = SlidingWindowLabels(FLOAT32, ROI, 4)
    got = inferer(as_batch(*volumes), network)
    assert (got.shape, got.dtype) == ((2, 1, 13, 11, 12), torch.uint8)
    for labels, volume in zip(got, volumes, strict=True):
        expected = Segmenter([network], FLOAT32, SlidingWindow(ROI, 4))(volume).labels
        np.testing.assert_array_equal(labels[0], expected)
        data = ToOriginalGridd()({"image": volume, "pred": labels, "case_id": "1.2.840"})
        np.testing.assert_array_equal(data["pred"][0], expected)
        np.testing.assert_allclose(data["pred"].affine, volume.meta["original_affine"])
        assert data["pred"].meta["filename_or_obj"] == "1.2.840.nii.gz"


def test_logits_that_are_not_finite_are_background_in_an_evaluator(caplog):
    volume, _ = grid_of(AFFINES["RAS"])
    network = Net()
    network.bias.data[1] = torch.nan
    with caplog.at_level(logging.WARNING):
        got = SlidingWindowLabels(FLOAT32, ROI, 4)(as_batch(volume), network)
    assert not got.any()
    assert "Validation: expected finite logits" in caplog.text


class Greedy(Net):
    """Has no memory for more than some windows at once."""

    def __init__(self, most):
        super().__init__()
        self.most, self.seen = most, []

    def forward(self, windows):
        self.seen.append(len(windows))
        if len(windows) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(windows)


def test_out_of_memory_takes_fewer_windows_at_once_and_says_so(caplog):
    volume, _ = grid_of(AFFINES["RAS"])
    network = Greedy(1)
    inferer = SlidingWindow(ROI, 4, sw_batch_size=4)
    segmenter = Segmenter([network], FLOAT32, inferer)
    with caplog.at_level(logging.WARNING):
        found = segmenter(volume)
    assert network.seen[:3] == [4, 2, 1]
    assert "Out of memory: going on with 2 windows at once" in caplog.text
    assert "Out of memory: going on with 1 windows at once" in caplog.text
    np.testing.assert_array_equal(
        found.labels, Segmenter([Net()], FLOAT32, SlidingWindow(ROI, 4))(volume).labels
    )
    network.seen.clear()
    segmenter(volume)
    assert set(network.seen) == {1}, "what was learnt is kept for the next volume"
    assert inferer.sw_batch_size == 4, "it is the segmenter's alone"


def test_out_of_memory_with_one_window_ends_it_on_a_cpu():
    volume, _ = grid_of(AFFINES["RAS"])
    with pytest.raises(torch.OutOfMemoryError):
        Segmenter([Greedy(0)], FLOAT32, SlidingWindow(ROI, 4))(volume)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_out_of_memory_of_sums_goes_on_in_the_hosts_memory(caplog):
    """A card that has room for the network, not for the sums."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    volume, _ = grid_of(AFFINES["RAS"])
    large = type(volume)(torch.randn(3, 96, 96, 96), affine=torch.eye(4, dtype=torch.float64))
    large.meta |= {"original_affine": np.eye(4), "spatial_shape": np.array([96, 96, 96])}
    precision = Precision("cuda", amp=False)
    network = torch.nn.Conv3d(3, 100, 1).to(device)
    inferer = SlidingWindow((32, 32, 32), 100, 1)
    free = Segmenter([network], precision, inferer)(large)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(150e6 / total)
    try:
        with caplog.at_level(logging.WARNING):
            tight = Segmenter([network], precision, inferer)(large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "going on with sums in the host's memory" in caplog.text
    assert (tight.labels == free.labels).mean() > 0.9999

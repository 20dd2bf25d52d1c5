"""How far the surfaces of two masks lie apart.

The surface of a mask is the set of its voxels that have a face in common with a voxel outside the
mask, or with the border of the volume: what MONAI's erosion takes away. A distance is one between
centres of voxels, so that equal masks are 0 mm apart, and a mask of one voxel is its own surface.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance

# relative; spacings pass through float32 in headers, and distances in MONAI: without it a surface
# of which all voxels lie one voxel of 1.2 mm off would not be within 1.2 mm
ROUNDING = 1e-5


def surface_measures(
    pred: np.ndarray,
    label: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Three measures of the distances from either surface to the nearest voxel of the other.

    Args:
        pred: `(H, W, D)` bool mask, not empty.
        label: `(H, W, D)` bool reference on the same grid, not empty.
        spacing_mm: Voxel size in mm, in array-axis order; axes are taken to be perpendicular.
        tolerance_mm: Distance up to which surfaces are taken to agree.
        device: Where MONAI works: it has a CUDA way where cuCIM is installed, else SciPy's.

    Returns:
        `hd95_mm`: the larger of the 95th percentiles of the two directions, in mm; `assd_mm`: mean
        over the distances of both directions together, in mm; `nsd`: share of them within the
        tolerance, 0 to 1.

    Source: Huttenlocher et al., IEEE TPAMI 15 (1993) for the Hausdorff distance by ranks; Heimann
    et al., IEEE TMI 28 (2009) for the average symmetric distance; Nikolov et al., J Med Internet
    Res 23 (2021) for surface Dice, here over voxels instead of pieces of a mesh.
    """
    # as MONAI's get_edge_surface_distance, which warns of an argument of its own
    masks = (torch.as_tensor(mask, device=device) for mask in (pred, label))
    edges: tuple[torch.Tensor, torch.Tensor] = get_mask_edges(*masks)
    spacing = [float(size) for size in spacing_mm]
    directed = [
        torch.as_tensor(get_surface_distance(*way, spacing=spacing)).double().cpu().numpy()
        for way in (edges, edges[::-1])
    ]
    both = np.concatenate(directed)
    return {
        "hd95_mm": max(float(np.percentile(distances, 95)) for distances in directed),
        "assd_mm": float(both.mean()),
        "nsd": float(np.mean(both <= tolerance_mm * (1 + ROUNDING))),
    }

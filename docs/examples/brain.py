"""Statistics of a brain, and of the air around it: masked moments on real volumes.

Reads the functional MRI that ships with nibabel's tests, one volume at a time, takes the moments of
all voxels and of those in the head, normalizes with either, and draws both. Prints what
docs/statistics.md quotes. Needs the extra ``cybn[docs]``:

    python docs/examples/brain.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

import cybn

VOLUMES = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
PICTURE = Path(__file__).resolve().parents[1] / "pictures" / "brain.png"
SLICE = 12
RANGE = (-2.5, 2.5)


def volumes(path: Path) -> list[NDArray[np.float32]]:
    """Return each volume as (N, C, D, H, W) with N = C = 1."""
    image = nibabel.load(path)
    each = [np.asarray(image.dataobj[..., i], np.float32) for i in range(image.shape[-1])]
    return [volume.T[np.newaxis, np.newaxis] for volume in each]


def head(x: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return where the head is: above half the median of what is not zero.

    A threshold is all it takes here, where the histogram has a gap between air and tissue; it
    leaves out most of the fluid at the rim. It is no substitute for a real brain mask.
    """
    return x > np.median(x[x > 0]) / 2


def statistics(
    batches: list[NDArray[np.float32]],
) -> tuple[cybn.Moments, cybn.Moments]:
    """Return the moments of all voxels, and of those in the head."""
    everything = inside = cybn.Moments.empty(1)
    for x in batches:
        everything = everything.update(x)
        inside = inside.update(x, mask=head(x))
    return everything, inside


def normalized(x: NDArray[np.float32], moments: cybn.Moments) -> NDArray[np.float32]:
    """Return x as a `BatchNorm3d` with these running statistics sees it in inference."""
    bn = cybn.BatchNorm3d(1).eval()
    bn.set_statistics(moments)
    return bn(x)


def draw(x: NDArray[np.float32], each: dict[str, cybn.Moments], path: Path) -> None:
    """Draw one slice and the histogram of the head, normalized with each of the moments."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 3, figsize=(10, 3.2), layout="constrained", width_ratios=(1, 1, 1.15)
    )
    mask = head(x)
    for panel, (name, moments) in zip(axes, each.items(), strict=False):
        y = normalized(x, moments)
        drawn = panel.imshow(y[0, 0, SLICE], cmap="gray", origin="lower", clim=RANGE)
        panel.set(title=f"normalized with {name}", xticks=[], yticks=[])
        axes[2].hist(y[mask], np.linspace(*RANGE, 41), histtype="step", density=True, label=name)
    figure.colorbar(drawn, ax=axes[:2], shrink=0.8, location="left")
    axes[2].set(xlabel="normalized value of the voxels in the head", yticks=[], xlim=RANGE)
    axes[2].legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the statistics and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    picture = parser.parse_args().picture
    batches = volumes(VOLUMES)
    everything, inside = statistics(batches)
    each = {"all voxels": everything, "the head": inside}
    print("| statistics of | voxels | mean | standard deviation | the head becomes |")
    print("| --- | ---: | ---: | ---: | --- |")
    for name, m in each.items():
        seen = cybn.Moments.empty(1)
        for x in batches:
            seen = seen.update(normalized(x, m), mask=head(x))
        mean = round(seen.mean[0], 2) + 0.0  # no minus before zero
        becomes = f"mean {mean:.2f}, standard deviation {seen.var()[0] ** 0.5:.2f}"
        std = m.var()[0] ** 0.5
        print(f"| {name} | {m.count} | {m.mean[0]:.1f} | {std:.1f} | {becomes} |")
    draw(batches[0], each, picture)


if __name__ == "__main__":
    main()

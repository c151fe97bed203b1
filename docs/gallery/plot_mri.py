"""
Statistics of a brain scan with a mask
======================================

**Question.** Two thirds of the voxels of a brain scan are air. What does that do to the statistics
of a batch norm, and does a mask help?

nibabel ships a functional MRI for its tests: two volumes of 24 x 96 x 128 voxels. This example
compares the moments of all voxels with those of the voxels in the head, and normalizes the scan
with both. It uses no random numbers, so one run is enough.
"""

# %%
# The volumes, one at a time
# --------------------------
# A voxel belongs to the head if it is above half the median of the voxels that are not zero. This
# is enough here, because the histogram has a gap between air and tissue. It does not replace a real
# brain mask.
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel
import numpy as np

import cybn

scan = nibabel.load(Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz")
volumes = [np.asarray(scan.dataobj[..., i], np.float32).T[None, None] for i in range(2)]


def head(x):
    return x > np.median(x[x > 0]) / 2


everything = inside = cybn.Moments.empty(1)
for x in volumes:  # (1, 1, depth, height, width)
    everything = everything.update(x)
    inside = inside.update(x, mask=head(x))


# %%
# Result
# ------
def normalized(x, moments):
    """Return x as a batch norm with these running statistics sees it in inference."""
    bn = cybn.BatchNorm3d(1).eval()
    bn.set_statistics(moments)
    return bn(x)


def row(name, moments):
    seen = np.concatenate([normalized(x, moments)[head(x)] for x in volumes])
    print(
        f"{name:10} {moments.count:7} voxels, mean {moments.mean[0]:.1f}, standard deviation"
        f" {moments.std()[0]:.1f}; the head becomes mean {abs(seen.mean()):.2f},"
        f" standard deviation {seen.std():.2f}"
    )


row("all voxels", everything)
row("the head", inside)

figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
axes[0].hist(volumes[0].ravel(), 80, log=True, color="gray")
for moments, colour, name in (
    (everything, "#D55E00", "all voxels"),
    (inside, "#0072B2", "the head"),
):
    axes[0].axvline(moments.mean[0], color=colour, label=f"mean of {name}")
axes[0].legend(fontsize=8)
axes[0].set(title="Values of the scan", xlabel="signal", ylabel="voxels")
for ax, moments, name in zip(
    axes[1:], (everything, inside), ("all voxels", "the head"), strict=True
):
    shown = normalized(volumes[0], moments)[0, 0, 12]
    picture = ax.imshow(shown[::-1], cmap="gray", vmin=-2.5, vmax=2.5)
    ax.set_title(f"Normalized by the statistics of {name}", fontsize=10)
    ax.axis("off")
figure.colorbar(picture, ax=axes[1:], shrink=0.8)

# %%
# Answer
# ------
# The mask helps. Without it, the mean has a value that no tissue has, and the standard deviation is
# mostly the difference between air and head. So the values of the head have a standard deviation of
# only 0.4, around a mean of 1.35. With the statistics of the head they have mean 0 and standard
# deviation 1. In training, pass the mask to the layer: ``bn(x, mask=...)``.

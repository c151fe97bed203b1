"""
A generative adversarial network on digits
==========================================

**Question.** Generative adversarial networks are hard to train, and batch normalization is part of
most recipes for them. In which of the two networks does it help: in the generator, which draws
digits, or in the discriminator, which distinguishes drawn digits from real ones?

Both are small convolutional networks in NumPy, trained with Adam on 1797 real digits of 8 x 8
pixels. Five ways are compared: no batch normalization; in the generator only; in the
discriminator only, with real and drawn images in separate batches; in both; and in both with real
and drawn images mixed in one batch.
"""

# %%
# The networks
# ------------
# The generator makes 8 x 8 pixels out of 16 random numbers. The discriminator gives one score.
# Convolutions, pooling and dense layers are those of the demo.
import os

import matplotlib.pyplot as plt
import numpy as np
from scipy.linalg import sqrtm
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

import cybn
from cybn.demo.data import batches, load_digits
from cybn.demo.network import AveragePool, Conv3x3, Dense, Flatten, Network, Plain, ReLU, Sigmoid

SEEDS = range(min(3, int(os.environ.get("CYBN_GALLERY_SEEDS", "5"))))
STEPS, BATCH, NOISE = 900, 32, 16
threadpool_limits(1, user_api="blas")  # the matrices are small


class Unflatten(Plain):
    """Reshape (N, C*4*4) to (N, C, 4, 4)."""

    def __call__(self, x):
        return x.reshape(len(x), -1, 4, 4)

    def backward(self, dy):
        return dy.reshape(len(dy), -1)


class Double(Plain):
    """Repeat each pixel, so that it becomes 2 x 2 pixels."""

    def __call__(self, x):
        return x.repeat(2, axis=2).repeat(2, axis=3)

    def backward(self, dy):
        n, c, h, w = dy.shape
        return dy.reshape(n, c, h // 2, 2, w // 2, 2).sum((3, 5))


class LeakyReLU(Plain):
    """Divide negative values by five."""

    def __call__(self, x):
        self.slope = np.where(x > 0, np.float32(1), np.float32(0.2))
        return x * self.slope

    def backward(self, dy):
        return dy * self.slope


def generator(rng, normalized):
    norm = (lambda c: [cybn.BatchNorm2d(c)]) if normalized else (lambda c: [])
    return Network(
        *[Dense(rng, NOISE, 256, 0.2), Unflatten(), *norm(16), ReLU(), Double()],
        *[Conv3x3(rng, 16, 8, (2 / 144) ** 0.5), *norm(8), ReLU()],
        *[Conv3x3(rng, 8, 1, (1 / 72) ** 0.5), Sigmoid()],
    )


def discriminator(rng, normalized):
    norm = (lambda c: [cybn.BatchNorm2d(c)]) if normalized else (lambda c: [])
    return Network(
        *[Conv3x3(rng, 1, 8, (2 / 9) ** 0.5), LeakyReLU(), AveragePool()],
        *[Conv3x3(rng, 8, 16, (2 / 72) ** 0.5), *norm(16), LeakyReLU(), AveragePool()],
        *[Flatten(), Dense(rng, 64, 1, 0.12)],
    )


# %%
# Training
# --------
# ``Network.backward`` computes the gradients of all parameters. The generator also needs the
# gradient of the discriminator's input.
class Adam:
    def __init__(self, net, rate=2e-3, beta1=0.5, beta2=0.99):
        self.net, self.rate, self.betas, self.t = net, rate, (beta1, beta2), 0
        self.first = [np.zeros_like(p) for layer in net.layers for p in layer.parameters()]
        self.second = [np.zeros_like(p) for p in self.first]

    def step(self, gradients):
        self.t += 1
        b1, b2 = self.betas
        rate = np.float32(self.rate * (1 - b2**self.t) ** 0.5 / (1 - b1**self.t))
        parameters = [p for layer in self.net.layers for p in layer.parameters()]
        for p, g, m, v in zip(parameters, gradients, self.first, self.second, strict=True):
            m += np.float32(1 - b1) * (g - m)
            v += np.float32(1 - b2) * (g * g - v)
            p -= rate * m / (np.sqrt(v) + np.float32(1e-8))


def gradients(net, dy):
    """Return the gradient of the input, and those of all parameters."""
    for layer in reversed(net.layers):
        dy = layer.backward(dy)
    return dy, [g.copy() for layer in net.layers for g in layer.gradients()]


def score_gradient(scores, real):
    """Return the gradient of the mean of log(1 + exp(-+score)), the usual loss."""
    probability = 1 / (1 + np.exp(-np.clip(scores, -30, 30)))
    return ((probability - real) / len(scores)).astype(np.float32)


KINDS = {
    "none": (False, False, False),
    "generator": (True, False, False),
    "discriminator": (False, True, False),
    "both": (True, True, False),
    "both, mixed batch": (True, True, True),
}


def run(seed, kind):
    """Train one pair of networks, and return 1000 drawn images."""
    in_generator, in_discriminator, mixed = KINDS[kind]
    rng = np.random.default_rng([seed, 1])
    images = load_digits(seed).train_x
    g, d = generator(rng, in_generator), discriminator(rng, in_discriminator)
    adam_g, adam_d = Adam(g), Adam(d)
    order = batches(rng, len(images), BATCH)
    for _ in range(STEPS):
        real = images[next(order)]
        drawn = g(rng.standard_normal((BATCH, NOISE), dtype=np.float32))
        if mixed:
            labels = np.repeat(np.float32([[1], [0]]), BATCH, axis=0)
            dy = 2 * score_gradient(d(np.concatenate([real, drawn])), labels)
            _, both = gradients(d, dy)
            adam_d.step(both)
            scores = d(np.concatenate([real, drawn]))  # the same statistics for the generator
            dy = score_gradient(scores[BATCH:], np.float32(1))
            dx, _ = gradients(d, np.concatenate([np.zeros_like(dy), dy]))
            dx = dx[BATCH:]
        else:
            _, first = gradients(d, score_gradient(d(real), np.float32(1)))
            _, second = gradients(d, score_gradient(d(drawn), np.float32(0)))
            adam_d.step([a + b for a, b in zip(first, second, strict=True)])
            dx, _ = gradients(d, score_gradient(d(drawn), np.float32(1)))
        adam_g.step(gradients(g, dx)[1])
    g.eval()
    return g(rng.standard_normal((1000, NOISE), dtype=np.float32))


# %%
# How good are the images?
# ------------------------
# There are two measures. The *distance* is Fréchet's distance between the mean and covariance of
# the pixels and those of the real images. *Digits* is the number of digits that make up at least 3
# % of the drawn images, classified by the nearest real images.
digits = load_digits(0)
everything = np.concatenate([digits.train_x, digits.test_x]).reshape(-1, 64).astype(np.float64)
labels = np.concatenate([digits.train_y, digits.test_y])
neighbours = KNeighborsClassifier(5).fit(everything, labels)


def distance(a, b):
    """Return Fréchet's distance between two normal distributions fitted to the rows."""
    ca, cb = (np.cov(x, rowvar=False) + 1e-6 * np.eye(64) for x in (a, b))
    root = np.trace(np.real(sqrtm(ca @ cb)))
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca) + np.trace(cb) - 2 * root


def quality(images):
    flat = images.reshape(-1, 64).astype(np.float64)
    share = np.bincount(neighbours.predict(flat), minlength=10) / len(flat)
    return distance(flat, everything), np.count_nonzero(share >= 0.03)


drawn = {kind: [run(seed, kind) for seed in SEEDS] for kind in KINDS}
found = {kind: np.array([quality(images) for images in runs]) for kind, runs in drawn.items()}

# %%
# Result
# ------
half = distance(everything[::2], everything[1::2])
print(f"{len(SEEDS)} seeds, {STEPS} steps of {BATCH} images; mean, standard deviation, each seed")
print(f"distance between two halves of the real images: {half:.2f}")
for kind, values in found.items():
    each = " ".join(f"{v:.2f}" for v in values[:, 0])
    print(
        f"{kind:18} distance {values[:, 0].mean():.2f} +- {values[:, 0].std():.2f} ({each})"
        f"   digits {values[:, 1].mean():.1f}"
    )

figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), layout="constrained")
shown = {"real": everything[:36]} | {kind: runs[0][:36] for kind, runs in drawn.items()}
frame = ((0, 0), (0, 0), (1, 1), (1, 1))
for ax, (kind, images) in zip(axes.ravel(), shown.items(), strict=True):
    tiles = np.pad(images.reshape(6, 6, 8, 8), frame, constant_values=0.4)
    ax.imshow(tiles.transpose(0, 2, 1, 3).reshape(60, 60), cmap="gray", vmin=0, vmax=1)
    ax.set_title(kind if kind == "real" else f"batch norm: {kind}", fontsize=10)
    ax.axis("off")

# %%
# Answer
# ------
# Batch normalization helps in the discriminator. There it lowers the mean distance from 1.10 to
# 0.76, and it is lower with every seed. In the generator alone it does not help: the distance is
# 1.24, and the ranges overlap. With it in both networks the mean is 0.92, with the largest spread.
# Mixing real and drawn images in one batch reduces the spread, but hardly the mean.
#
# Without batch normalization the generators fail to draw some digits: on average 9.3 of the ten
# were frequent enough. With it in either network, all ten were. No network is good after 900 steps:
# the distance between two halves of the real images is 0.07. The usual advice is batch
# normalization in both networks. These small networks do not confirm it.
#
# The figures come from three seeds on an Intel Xeon (family 6, model 207). The learning rate was
# the same for all and was not tuned for each.

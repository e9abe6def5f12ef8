"""The views of the paper's ablation: CutMix boxes and their exact shares, features mixed in front of the classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError
from jaxvision.core.types import no_tap
from jaxvision.methods.rankmixup.forward import forward_mixed_features, forward_twice
from jaxvision.methods.rankmixup.views import draw_views, mix_rows, mixed_views
from jaxvision.models.heads import pooled_vector
from jaxvision.models.plain_cnn import PlainCNN
from jaxvision.models.resnet import ResNet
from tests.losses.oracle import TinyNet

B, H, W, K, M = 8, 6, 9, 5, 3
DRAW = {"num_views": M, "alpha": 1.0}
LABELS = jnp.asarray(np.random.default_rng(0).integers(0, K, B), jnp.int32)


@pytest.mark.parametrize("per_sample", [False, True])
def test_cutmix_puts_a_box_of_the_partner_into_the_image_and_counts_it(per_sample):
    """Pixels say which image they are of, and where."""
    place = np.arange(H * W, dtype=np.float32).reshape(H, W)
    x = jnp.stack(jnp.broadcast_arrays(jnp.arange(B, dtype=jnp.float32)[:, None, None], jnp.asarray(place)), -1)

    @jax.jit
    def draw(key):
        views = mixed_views(key, x, LABELS, num_classes=K, mix="cutmix", per_sample=per_sample, **DRAW)
        return views, draw_views(key, LABELS, per_sample=per_sample, **DRAW)

    cut_off = 0
    for seed in range(4):
        views, drawn = jax.tree.map(np.asarray, draw(jax.random.key(seed)))
        images, targets = views.images.reshape(M, B, H, W, 2), views.targets.reshape(M, B, K)
        assert (images[..., 1] == place).all()
        # The box loses what its sides are rounded by and what lies beyond the image, and never gains.
        assert (views.lam >= drawn.lam - 1e-6).all()
        cut_off += (views.lam > drawn.lam + 1e-3).sum()
        for view in range(M):
            lam = np.broadcast_to(views.lam[view], B)
            for image in range(B):
                partner = drawn.perm[view, image]
                foreign = images[view, image, ..., 0] != image
                if partner == image:
                    assert not foreign.any()
                    continue
                assert (images[view, image, ..., 0][foreign] == partner).all()
                rows, columns = foreign.any(1), foreign.any(0)
                assert foreign.sum() == rows.sum() * columns.sum()
                assert 1 - foreign.mean() == pytest.approx(lam[image], abs=1e-6)
                expected = lam[image] * np.eye(K)[LABELS[image]] + (1 - lam[image]) * np.eye(K)[LABELS[partner]]
                np.testing.assert_allclose(targets[view, image], expected, atol=1e-6)
        np.testing.assert_allclose(views.relevance, targets.max(-1), atol=1e-6)
        np.testing.assert_array_equal(views.keep, np.asarray(LABELS) != np.asarray(LABELS)[drawn.perm])
    assert cut_off > 0
    assert len(np.unique(views.lam)) > (M if per_sample else 1)


class Linear(nn.Module):
    """Affine up to the logits."""

    @nn.compact
    def __call__(self, x, train=False, tap=no_tap):
        x = nn.Dense(6, name="trunk")(tap("trunk", x.reshape(len(x), -1)))
        return nn.Dense(K, name="fc")(tap("fc", x))


def linear_example():
    x = jax.random.normal(jax.random.key(0), (B, 2, 3, 2))
    return Linear().init(jax.random.key(1), x), x


@pytest.mark.parametrize("per_sample", [False, True])
def test_features_of_a_linear_trunk_are_those_of_mixed_images(per_sample):
    """Values, and gradients through the trunk."""
    variables, x = linear_example()
    drawn = draw_views(jax.random.key(2), LABELS, per_sample=per_sample, **DRAW)

    def of(forward, *inputs):
        def loss(params):
            raw, mixed, state = forward(Linear(), {"params": params}, x, *inputs)
            assert state == {}
            return jnp.mean(raw**2) + jnp.sum(jnp.tanh(mixed)), (raw, mixed)

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    features = of(forward_mixed_features, drawn.lam, drawn.perm)
    images = of(forward_twice, mix_rows(x, drawn.lam, drawn.perm))
    assert features[1][1].shape == (M * B, K)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5), features, images)
    assert np.abs(features[0]["trunk"]["kernel"]).min() > 1e-3


def test_four_devices_mix_features_as_one():
    """Partners are on other devices, and gradients come back from there."""
    variables, x = linear_example()

    def gradient(x, labels):
        drawn = draw_views(jax.random.key(2), labels, **DRAW)

        def loss(params):
            _, mixed, _ = forward_mixed_features(Linear(), {"params": params}, x, drawn.lam, drawn.perm)
            return jnp.mean(jnp.tanh(mixed) ** 2)

        return devices.mean_over_devices(jax.grad(loss)(variables["params"]))

    def local(x, labels):
        with devices.device_axis("d"):
            return gradient(x, labels)

    whole = jax.jit(gradient)(x, LABELS)
    parts = jax.jit(jax.vmap(local, axis_name="d"))(x.reshape(4, 2, *x.shape[1:]), LABELS.reshape(4, 2))
    jax.tree.map(lambda one, each: np.testing.assert_allclose(each[0], one, rtol=1e-4, atol=1e-6), whole, parts)


def test_a_residual_network_mixes_the_maps_of_its_last_stage():
    """Written out: the last maps mixed, then pooled; both passes move the statistics of the raw batch."""
    settings = {"block": "basic", "stage_sizes": (1, 1, 1, 1), "width": 4, "stem": "tiny_imagenet"}
    network, trunk = ResNet(K, **settings), ResNet(K, features=True, **settings)
    x = jax.random.normal(jax.random.key(0), (B, 32, 32, 3))
    variables = jax.jit(network.init)(jax.random.key(1), x)
    drawn = draw_views(jax.random.key(2), LABELS, **DRAW)

    def ours(params):
        _, mixed, state = forward_mixed_features(network, {**variables, "params": params}, x, drawn.lam, drawn.perm)
        return jnp.sum(jnp.tanh(mixed)), (mixed, state)

    def written_out(params):
        body = {name: tree for name, tree in params.items() if name != "fc"}
        stats = variables["batch_stats"]
        for _ in range(2):
            maps, new = trunk.apply({"params": body, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            stats = new["batch_stats"]
        mixed = pooled_vector(mix_rows(maps[-1], drawn.lam, drawn.perm), 2)
        mixed = mixed @ params["fc"]["kernel"] + params["fc"]["bias"]
        return jnp.sum(jnp.tanh(mixed)), (mixed, {"batch_stats": stats})

    found, wanted = (jax.jit(jax.grad(f, has_aux=True))(variables["params"]) for f in (ours, written_out))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, wanted)
    assert np.abs(found[0]["conv1"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (TinyNet(), "TinyNet names no places"),
        (
            PlainCNN(K, features=(3,), strides=(1,), dilations=(1,), dense=True),
            r"PlainCNN has its last values of shape \(8, 4, 4, 3\) at 'fc'; use layer='input'",
        ),
    ],
)
def test_networks_without_a_vector_in_front_of_the_classifier_are_refused(module, message):
    x = jnp.zeros((B, 4, 4, 1))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    drawn = draw_views(jax.random.key(2), LABELS, **DRAW)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda v: forward_mixed_features(module, v, x, drawn.lam, drawn.perm), variables)

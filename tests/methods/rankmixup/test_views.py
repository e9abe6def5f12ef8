"""RankMixup's views on the official mixing, their statistics, 1 and 8 devices, and whole steps of two forwards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError
from jaxvision.methods.rankmixup.forward import forward_twice
from jaxvision.methods.rankmixup.rankmixup import mndcg_loss, mrl_loss
from jaxvision.methods.rankmixup.views import Views, mix_with, mixed_views
from jaxvision.models.mixing import soft_targets
from jaxvision.optim import optimizers
from tests.arrays import load
from tests.losses.oracle import FOLDER, TinyNet, check, variables

B, K = 8, 5


def example():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(B, 3, 4, 2)), jnp.float32), jnp.asarray(rng.integers(0, K, B), jnp.int32)


@pytest.mark.parametrize("k", range(2))
def test_official_mixing(k):
    data = load(FOLDER / "rankmixup" / f"mixup_views_{k}.npz")
    one_hot = soft_targets(jnp.asarray(data["labels"]), int(data["num_classes"]))
    images, targets = mix_with(jnp.asarray(data["x"]), one_hot, jnp.asarray(data["lam"], jnp.float32), data["perm"])
    check(images, data["x_mix"], 1e-6)
    check(targets, data["target_mix"], 1e-6)


@pytest.mark.parametrize("per_sample", [False, True])
def test_views_hold_together(per_sample):
    """Images that are made of their class, so that a mixture shows its target."""
    _, labels = example()
    x = jnp.broadcast_to(jax.nn.one_hot(labels, K)[:, None, None], (B, 2, 2, K))
    draw = lambda key: mixed_views(key, x, labels, num_classes=K, num_views=3, alpha=2.0, per_sample=per_sample)  # noqa: E731
    views = jax.jit(draw)(jax.random.key(1))
    assert views.images.shape == (3 * B, 2, 2, K) and views.targets.shape == (3 * B, K)
    assert views.lam.shape == ((3, B) if per_sample else (3,)) and len(np.unique(views.lam)) == views.lam.size
    np.testing.assert_allclose(views.images[:, 1, 0], views.targets, atol=1e-6)
    targets = np.asarray(views.targets).reshape(3, B, K)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(views.relevance, targets.max(-1), rtol=1e-6)
    np.testing.assert_array_equal(views.keep, (targets > 1e-6).sum(-1) == 2)
    assert (np.asarray(views.relevance)[~np.asarray(views.keep)] == 1).all() and not views.keep.all()


def test_coefficients_are_not_folded_and_permutations_are_uniform():
    draw = jax.jit(
        jax.vmap(lambda key: mixed_views(key, jnp.arange(4.0), jnp.arange(4), num_classes=4, num_views=1, alpha=2.0))
    )
    views = draw(jax.random.split(jax.random.key(0), 4000))
    lam = np.asarray(views.lam)[:, 0]
    assert abs(lam.mean() - 0.5) < 0.02 and abs(lam.var() - 1 / 20) < 0.005
    assert abs((~views.keep).mean() - 1 / 4) < 0.02


def test_images_keep_their_dtype():
    x, labels = example()
    one_hot, lam, perm = soft_targets(labels, K), jnp.asarray([0.3]), jnp.arange(B)[None, ::-1]
    images, targets = mix_with(x.astype(jnp.bfloat16), one_hot, lam, perm)
    assert images.dtype == jnp.bfloat16 and targets.dtype == jnp.float32
    np.testing.assert_allclose(images.astype(jnp.float32), 0.3 * x + 0.7 * x[::-1], atol=0.03)


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_without_mixing(alpha):
    x, labels = example()
    draw = jax.jit(lambda key: mixed_views(key, x, labels, num_classes=K, num_views=1, alpha=alpha))
    views = draw(jax.random.key(0))
    np.testing.assert_array_equal(views.images, x)
    np.testing.assert_array_equal(views.relevance, np.ones((1, B)))


def test_wrong_settings():
    x, labels = example()
    for views in (0, 2.5, True):
        with pytest.raises(ConfigError, match=f"num_views={views} must be a whole number of at least 1"):
            mixed_views(jax.random.key(0), x, labels, num_classes=K, num_views=views, alpha=1.0)
    with pytest.raises(ConfigError, match="per_sample=2 must be True or False"):
        mixed_views(jax.random.key(0), x, labels, num_classes=K, num_views=1, alpha=1.0, per_sample=2)
    with pytest.raises(ConfigError, match="mix='cutmixup' is unknown; did you mean 'cutmix'"):
        mixed_views(jax.random.key(0), x, labels, num_classes=K, num_views=1, alpha=1.0, mix="cutmixup")
    with pytest.raises(ConfigError, match="alpha=nan must be a finite number"):
        mixed_views(jax.random.key(0), x, labels, num_classes=K, num_views=1, alpha=float("nan"))


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_four_devices_mix_as_one(per_sample, mix):
    x, labels = example()

    def draw(x, labels):
        options = {"num_classes": K, "num_views": 2, "alpha": 2.0, "per_sample": per_sample, "mix": mix}
        return mixed_views(jax.random.key(3), x, labels, **options)

    def local(x, labels):
        with devices.device_axis("d"):
            return draw(x, labels)

    whole = jax.jit(draw)(x, labels)
    parts = jax.jit(jax.vmap(local, axis_name="d"))(x.reshape(4, 2, 3, 4, 2), labels.reshape(4, 2))

    def join(array):  # [device, view x row, ...] -> [view x device x row, ...]
        return np.moveaxis(np.asarray(array).reshape(4, 2, 2, *array.shape[2:]), 0, 1).reshape(2 * B, *array.shape[2:])

    np.testing.assert_allclose(join(parts.images), whole.images, atol=1e-6)
    np.testing.assert_allclose(join(parts.targets), whole.targets, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate(list(parts.keep), 1), whole.keep)
    np.testing.assert_array_equal(np.concatenate(list(parts.lam), 1) if per_sample else parts.lam[0], whole.lam)


@pytest.mark.parametrize("k", range(3))
def test_two_training_steps(k):
    """The raw pass and the mixed pass both move the batch statistics."""
    data = load(FOLDER / "rankmixup" / f"train_step_{k}.npz")
    module, weight = TinyNet(), float(data["weight"])
    sgd = optimizers.sgd(
        float(data["learning_rate"]), float(data["momentum"]), weight_decay=float(data["weight_decay"])
    )
    transform = optax.chain(optimizers.clip_by_global_norm(float(data["clip_norm"])), sgd)

    @jax.jit
    def step(params, stats, opt_state, x, labels, lam, perm):
        images, _ = mix_with(x, soft_targets(labels, 6), lam, perm)
        views = Views(images, None, labels != labels[perm], lam)

        def loss(params):
            raw, mixed, new = forward_twice(module, {"params": params, "batch_stats": stats}, x, images)
            if int(data["is_mndcg"]):
                parts = mndcg_loss(raw, mixed, labels, views.relevance, weight=weight)[:3]
            else:
                hyper = {"margin": float(data["margin"]), "weight": weight, "official_broadcast": True}
                parts = mrl_loss(raw, mixed, labels, views.keep, **hyper)
            return parts[0], (jnp.stack(parts), raw, mixed, new["batch_stats"])

        gradient, aux = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = transform.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optax.tree.norm(gradient), aux

    state = jax.tree.map(jnp.asarray, variables(data, "init_"))
    params, stats = state["params"], state["batch_stats"]
    opt_state = transform.init(params)
    for s in range(2):
        lam = jnp.asarray(data["lam"][s], jnp.float32)
        params, opt_state, norm, (parts, raw, mixed, stats) = step(
            params, stats, opt_state, data["x"][s], jnp.asarray(data["labels"][s]), lam, jnp.asarray(data["perm"][s])
        )
        check(raw, data[f"step{s}_raw_logits"], 2e-5)
        check(mixed, data[f"step{s}_mix_logits"], 2e-5)
        check(parts, data[f"step{s}_loss_ce_rank"], 2e-5)
        check(norm, data[f"step{s}_grad_norm_before_clip"], 2e-5)
        new = {"params": params, "batch_stats": stats}
        jax.tree.map(lambda got, want: check(got, want, 2e-5), new, variables(data, f"step{s}_"))
    check(module.apply(new, data["x"][0]), data["eval_logits_after"], 5e-5)

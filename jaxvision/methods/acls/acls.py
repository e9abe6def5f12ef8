"""ACLS (Park, Noh, Oh, Baek, Ham; ICCV 2023): a penalty on logits that smooths labels adaptively and conditionally.

Beyond a margin, and in proportion to the excess, the logit of the predicted class is lowered and the others are
raised. Signature, masks and dtypes: see :mod:`jaxvision.losses.calibration`.

The released code and the paper differ in the first term, which measures the predicted logit from 0 in the code
(``reference="zero"``, the default: the published checkpoints come with it) and from the row's smallest logit in the
paper (``reference="min"``). They are different methods for the same margin: the range of a row is 1.5 to 2 times its
largest logit. The code's form changes when a constant is added to a row, though softmax doesn't: a network can lower
that term by shifting all logits down. In the paper's form the gradient has to flow through the minimum; with a
stop-gradient there nothing holds the other logits, and the mean logit runs away.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxvision.core.errors import unknown
from jaxvision.losses.calibration import (
    CalibrationLoss,
    Rows,
    at,
    check_number,
    masked_mean,
    mean_cross_entropy,
    one_hot,
    rows,
    top,
)
from jaxvision.metrics.mean import Mean

Reference = Literal["zero", "min"]
Form = Literal["squared", "linear"]
Terms = Literal["both", "top", "rest"]


class _Excess(NamedTuple):
    """What lies beyond the margin in rows of logits.

    Attributes:
      index, low_index: int32 [N], the first class with the largest, and with the smallest logit.
      tied: bool [N, K], the classes whose logit is the largest.
      top: float [N], [m - reference - M]_+.
      rest: float [N, K], [m - z - M]_+ of the classes that aren't tied; m is constant.
    """

    index: jax.Array
    low_index: jax.Array
    tied: jax.Array
    top: jax.Array
    rest: jax.Array


def _excess(z: jax.Array, margin: float, reference: Reference) -> _Excess:
    highest, index = top(z)
    low_index = jnp.argmin(z, axis=-1)
    base = at(z, low_index) if reference == "min" else 0.0
    constant = jax.lax.stop_gradient(highest)[:, None]
    tied = z == constant
    rest = jnp.where(tied, 0.0, jax.nn.relu(constant - z - margin))
    return _Excess(index, low_index, tied, jax.nn.relu(highest - base - margin), rest)


def acls_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    margin: float = 10.0,
    lambda_top: float = 1.0,
    lambda_rest: float = 0.1,
    alpha: float = 0.1,
    reference: Reference = "zero",
    form: Form = "squared",
    terms: Terms = "both",
    where: jax.Array | None = None,
) -> CalibrationLoss:
    """``CE + alpha R``, R = lambda_top mean_i top_i + lambda_rest / (K-1) mean_i rest_i.

      m_i = max_k z_ik, at class a_i;  T_i = {k: z_ik = m_i} (= {a_i} without ties)
      top_i  = |T_i| [m_i - base_i - M]_+^2,                       base = 0 or min_k z_ik
      rest_i = sum_{k not in T_i} [stop_gradient(m_i) - z_ik - M]_+^2

    The predicted class is penalised, whatever the label; labels enter through CE alone. Denominators are constants,
    not numbers of active elements. The gradient of top flows to the first maximal class (and to the first minimal one
    for ``reference="min"``), that of rest only to the classes outside T: see :func:`acls_logit_gradient`.

    Args:
      logits, labels, where: see :mod:`jaxvision.losses.calibration`; dense input too.
      margin: M, at least 0. 10 for Tiny-ImageNet and ImageNet, 6 for CIFAR.
      lambda_top, lambda_rest, alpha: weights, at least 0.
      reference: what the predicted logit is measured from, see the module's text.
      form: "squared" hinges, or "linear" ones (ablation).
      terms: "both", or one of them alone (ablation).

    Returns:
      ``extra`` is R.

    Raises:
      ConfigError: an unknown word or a negative number; and the errors of :mod:`jaxvision.losses.calibration`.

    Source: section 3 of the paper; ``losses/acls.py`` of the official code, which is followed.
    """
    _check(margin, lambda_top, lambda_rest, alpha, reference, form, terms)
    given = rows(logits, labels, where)
    excess = _excess(given.logits, margin, reference)
    power = 2 if form == "squared" else 1
    penalty = 0.0
    if terms != "rest":
        penalty += lambda_top * jnp.sum(excess.tied, axis=-1) * excess.top**power
    if terms != "top":
        penalty += lambda_rest / (given.num_classes - 1) * jnp.sum(excess.rest**power, axis=-1)
    extra, ce = masked_mean(penalty, given.where), mean_cross_entropy(given)
    return given.loss(ce + alpha * extra, ce, extra)


def smoothing_function(
    logits: jax.Array,
    *,
    margin: float = 10.0,
    lambda_top: float = 1.0,
    lambda_rest: float = 0.1,
    alpha: float = 0.1,
    reference: Reference = "zero",
    form: Form = "squared",
    terms: Terms = "both",
) -> jax.Array:
    """The f with which ACLS is cross-entropy against the target e_y - f: ``N dL/dz = p - (e_y - f)``.

      f_a = 2 alpha lambda_top |T| [m - base - M]_+             predicted class: its target is lowered
      f_k = -2 alpha lambda_rest / (K-1) [m - z_k - M]_+        the others: raised

    and the negative of the first on the smallest logit for ``reference="min"``. Doesn't sum to 0 in general. Linear in
    the excess for "squared", a step for "linear".

    Args:
      logits: float [..., K].
      The rest as for :func:`acls_loss`, and its errors.

    Returns:
      float32 [..., K].
    """
    _check(margin, lambda_top, lambda_rest, alpha, reference, form, terms)
    z = _unlabelled(logits, None).logits
    classes = z.shape[-1]
    excess = _excess(z, margin, reference)
    slope = (lambda x: 2.0 * x) if form == "squared" else (lambda x: (x > 0).astype(x.dtype))
    k = jnp.arange(classes)
    f = jnp.zeros_like(z)
    if terms != "rest":
        top_part = alpha * lambda_top * jnp.sum(excess.tied, axis=-1) * slope(excess.top)
        f += jnp.where(k == excess.index[:, None], top_part[:, None], 0.0)
        if reference == "min":
            f -= jnp.where(k == excess.low_index[:, None], top_part[:, None], 0.0)
    if terms != "top":
        f -= alpha * lambda_rest / (classes - 1) * slope(excess.rest)
    return f.reshape(jnp.shape(logits))


def acls_logit_gradient(
    logits: jax.Array, labels: jax.Array, *, where: jax.Array | None = None, **hyper: float | str
) -> jax.Array:
    """``dL/dz = (p - e_y + f) / N`` in closed form, f from :func:`smoothing_function`: float32 [..., K].

    Arguments and errors as for :func:`acls_loss`; N counts the valid rows, the others get 0. Nothing is differentiated
    but the mean over rows; softmax and f are written out.

    Source: derived from the loss of the official code (``losses/acls.py``), whose autograd it agrees with.
    """
    given: Rows = rows(logits, labels, where)
    gradient = jax.nn.softmax(given.logits, axis=-1) - one_hot(given) + smoothing_function(given.logits, **hyper)
    # The mean is linear: its gradient is the weight of every row.
    weight = jax.grad(lambda values: masked_mean(values, given.where))(jnp.zeros_like(gradient[:, 0]))
    return (gradient * weight[:, None]).reshape(jnp.shape(logits))


def acls_metrics(
    logits: jax.Array, *, margin: float = 10.0, reference: Reference = "zero", where: jax.Array | None = None
) -> dict[str, Mean]:
    """How much of the penalty is at work, as means over valid rows that merge.

    ``top_active``: share of rows beyond the margin; ``rest_active``: share of the other K - 1 classes (ties out of the
    numerator); ``top_logit``, ``mean_logit``, ``logit_range``: of the rows. At the start of training nothing is active.

    Args:
      logits: float [..., K].
      margin, reference: of the loss.
      where: bool [...].

    Returns:
      name -> :class:`~jaxvision.metrics.mean.Mean`.

    Raises:
      ConfigError: a negative margin, an unknown reference, fewer than two classes, a mask of another shape.

    Source: ours; the conditions of both terms in ``losses/acls.py`` of the official code.
    """
    _check(margin, 0.0, 0.0, 0.0, reference, "squared", "both")
    given = _unlabelled(logits, where)
    z = given.logits
    excess = _excess(z, margin, reference)
    highest, lowest = jnp.max(z, axis=-1), jnp.min(z, axis=-1)
    values = {
        "top_active": excess.top > 0,
        "rest_active": jnp.sum(excess.rest > 0, axis=-1) / (given.num_classes - 1),
        "top_logit": highest,
        "mean_logit": jnp.mean(z, axis=-1),
        "logit_range": highest - lowest,
    }
    return {name: Mean.of(value, given.where) for name, value in values.items()}


def _unlabelled(logits: jax.Array, where: jax.Array | None) -> Rows:
    return rows(logits, jnp.zeros(jnp.shape(logits)[:-1], jnp.int32), where)


def _check(
    margin: float, lambda_top: float, lambda_rest: float, alpha: float, reference: str, form: str, terms: str
) -> None:
    numbers = {"margin": margin, "lambda_top": lambda_top, "lambda_rest": lambda_rest, "alpha": alpha}
    for name, value in numbers.items():
        check_number(name, value)
    words = (
        ("reference", reference, ("zero", "min")),
        ("form", form, ("squared", "linear")),
        ("terms", terms, ("both", "top", "rest")),
    )
    for name, value, allowed in words:
        if value not in allowed:
            raise unknown(name, value, allowed)

"""The methods that IGQ-ViT is compared with, each ``build(context, bits, *, softmax_quantizers=None)``.

All quantize the same sites from the same calibration (``igq_vit.calibration``). APQ-ViT is not among them: there is no
official code, and its paper alone does not fix the method; its published numbers are cited in the method's README.
"""

from collections.abc import Callable

from jaxvision.methods.igq_vit.baselines import fqvit, groups_static, ptq4vit, repq, static
from jaxvision.methods.igq_vit.calibration import QuantizedNetwork

METHODS: dict[str, Callable[..., QuantizedNetwork]] = {
    "minmax": static.minmax,
    "ema": static.ema,
    "percentile": static.percentile,
    "omse": static.omse,
    "base_ptq": ptq4vit.base_ptq,
    "ptq4vit": ptq4vit.ptq4vit,
    "fqvit": fqvit.fqvit,
    "repq": repq.repq,
    "repq_rows": repq.repq_rows,
    "consecutive8": groups_static.consecutive8,
    "peg8": groups_static.peg8,
    "kmeans8": groups_static.kmeans8,
    "vsquant8": groups_static.vsquant8,
    "dynamic_tensor": groups_static.dynamic_tensor,
    "upper": groups_static.upper,
    "upper_static": groups_static.upper_static,
}

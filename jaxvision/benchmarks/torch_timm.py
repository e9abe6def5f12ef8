"""The same weights in timm's network, to look at both logits. Needs PyTorch and timm (the extra ``bench``)."""

from collections.abc import Mapping

import numpy as np

from jaxvision.core.errors import ConfigError, DataError

# timm computes these itself where a file lacks them.
_COMPUTED = ("num_batches_tracked", "relative_position_index", "attn_mask")


def logits(name: str, state: Mapping[str, np.ndarray], images: np.ndarray, num_classes: int) -> np.ndarray:
    """timm's logits, float32 [B, K], of normalised images float32 [B, H, W, 3], in evaluation mode.

    Args:
      name: of the network, timm's (ViT, DeiT, Swin, the ImageNet ResNets).
      state: PyTorch's names -> arrays; keys that timm's network doesn't have are passed over.
      images: of the network's input size.
      num_classes: K.

    Raises:
      ConfigError: timm isn't installed, or has no network of this name.
      DataError: an array of timm's network is missing, or has another shape.
    """
    try:
        import timm
        import torch
    except ImportError as error:
        raise ConfigError("--beside_timm needs PyTorch and timm: pip install 'jaxvision[bench]'") from error
    if not timm.is_model(name):
        raise ConfigError(f"--beside_timm: timm has no network named {name}; leave the option out")
    module = timm.create_model(name, pretrained=False, num_classes=num_classes).eval()
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
    try:
        missing = module.load_state_dict(tensors, strict=False).missing_keys
    except RuntimeError as error:
        raise DataError(f"timm's {name} doesn't take these weights: {' '.join(str(error).split())}") from error
    missing = [key for key in missing if not key.endswith(_COMPUTED)]
    if missing:
        raise DataError(f"timm's {name} misses {', '.join(missing[:3])} ({len(missing)} in all) in these weights")
    with torch.inference_mode():
        return module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()

"""IGQ-ViT: instance-aware group quantization for vision transformers (post-training)."""

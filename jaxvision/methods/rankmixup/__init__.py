"""RankMixup: mixup images rank the confidences of a network."""

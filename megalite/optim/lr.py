"""The learning rate as a pure function of how far the run is."""

from __future__ import annotations

from math import cos, pi, sqrt

from megalite.core.config import OptimConfig


def learning_rate(cfg: OptimConfig, *, done: float, warmup: float, total: float) -> float:
    """Rate of the step that ends at `done` of `total` (steps, or tokens), the first `warmup` linear from 0.

    cosine and linear reach min_lr_ratio x lr with the last step; wsd stays at lr and falls linearly
    over its last share (Hu et al. 2024, arXiv 2404.06395); inverse-square-root falls as sqrt(warmup
    / done) (Vaswani et al. 2017).
    """
    if done < warmup:
        return cfg.lr * done / warmup
    floor = cfg.lr * cfg.min_lr_ratio
    share = min(1.0, (done - warmup) / (total - warmup)) if total > warmup else 1.0
    if cfg.lr_decay == "cosine":
        return floor + (cfg.lr - floor) * 0.5 * (1 + cos(pi * share))
    if cfg.lr_decay == "linear":
        return floor + (cfg.lr - floor) * (1 - share)
    if cfg.lr_decay == "wsd":
        left = max(0.0, total - done) / (total * cfg.wsd_decay_share)
        return floor + (cfg.lr - floor) * min(1.0, left)
    if cfg.lr_decay == "inverse-square-root":
        anchor = max(warmup, 1.0)
        return max(floor, cfg.lr * sqrt(anchor / max(done, anchor)))
    return cfg.lr

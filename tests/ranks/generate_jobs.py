"""What the ranks of test_generate.py do."""

from __future__ import annotations

from pathlib import Path

from megalite.checkpoint.save import save
from megalite.core.config import Config, ModelConfig
from tests.ranks.jobs import engine_of
from tests.ranks.resume_jobs import facts


def save_untrained(rank: int, world: int, run: str, model: dict) -> None:
    """A run directory with the initial weights."""
    config = Config(model=ModelConfig(**model))
    engine = engine_of(config, rank, world, "float32")
    save(Path(run) / "checkpoints", engine.optimizer, engine.mesh, facts(config, 1, 0))

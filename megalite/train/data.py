"""The datasets and the tokenizer of a run, opened and checked against each other and the model."""

from __future__ import annotations

import json
from pathlib import Path

from megalite.core import comm
from megalite.core.config import Config
from megalite.core.errors import DataError, UserError
from megalite.core.mesh import Mesh
from megalite.data.indexed import IndexedDataset
from megalite.data.loader import Synthetic, TokenSource, Windows
from megalite.data.tokenizer import Tokenizer
from megalite.train.console import count


def find_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer that is named, or the copy beside the data; None where there is neither."""
    data = config.data
    beside = Path(f"{data.data}.tokenizer.json")
    path = Path(data.tokenizer) if data.tokenizer else beside
    if not data.tokenizer and not beside.exists():
        return None
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{path}: {tokenizer.vocab_size} ids, --vocab-size is {config.model.vocab_size} "
            f"(use --vocab-size {tokenizer.vocab_size})"
        )
    return tokenizer


def open_data(config: Config, prefix: str, mesh: Mesh) -> tuple[TokenSource, str]:
    """The windows of a dataset, and a few words on it. All ranks call it together."""
    model = config.model
    if prefix == "synthetic":
        return Synthetic(
            model.vocab_size, model.seq_len, config.train.seed
        ), "synthetic Markov chain"
    dataset = IndexedDataset(prefix)
    _check_tokenizer(config, prefix)
    wrong: DataError | None = None
    if mesh.rank == 0:  # reading every token once is enough, and rank 0 is who prints
        try:
            dataset.check_ids(model.vocab_size)
        except DataError as e:
            wrong = e
    if comm.any_true(wrong is not None, mesh.world):
        raise (
            wrong
            if wrong is not None
            else DataError(f"{prefix}: rank 0 found a token that does not fit")
        )
    windows = Windows(dataset.tokens, model.seq_len)
    if len(windows) == 0:
        raise DataError(
            f"{prefix}.bin: {len(dataset.tokens)} tokens, one sample needs --seq-len + 1 = {model.seq_len + 1}"
        )
    return (
        windows,
        f"{prefix}, {count(len(dataset.tokens))} tokens, {dataset.num_documents} documents",
    )


def _check_tokenizer(config: Config, prefix: str) -> None:
    """Raise DataError if the data says that it was made with another tokenizer than the run's."""
    meta = Path(f"{prefix}.json")
    if not config.data.tokenizer or not meta.exists():
        return
    claimed = json.loads(meta.read_text(encoding="utf-8")).get("tokenizer_sha256")
    ours = Tokenizer.load(config.data.tokenizer).sha256
    if claimed is not None and claimed != ours:
        raise DataError(
            f"{prefix}: made with tokenizer {claimed[:8]}, --tokenizer {config.data.tokenizer} is {ours[:8]} "
            "(preprocess the text again with this one)"
        )



"""The datasets and the tokenizer of a run, opened and checked against each other and the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megalite.core import comm
from megalite.core.config import Config, run_directory
from megalite.core.errors import DataError, UserError
from megalite.core.mesh import Mesh
from megalite.data.chat import Conversation, Template, read_conversations
from megalite.data.indexed import IndexedDataset
from megalite.data.loader import Synthetic, TokenSource, Windows
from megalite.data.packing import Conversations
from megalite.data.preferences import Pairs, read_preferences, render_pair
from megalite.data.strict_json import parse_json
from megalite.data.tokenizer import Tokenizer
from megalite.train.console import count


def find_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer that is named, or the copy beside the data or in the run that is begun from;
    None where there is none.
    """
    data, places = config.data, []
    if data.tokenizer:
        places = [Path(data.tokenizer)]
    else:
        places = [Path(f"{data.data}.tokenizer.json")]
        if config.train.init_from:
            places.append(run_directory(Path(config.train.init_from)) / "tokenizer.json")
        places = [place for place in places if place.exists()]
    if not places:
        return None
    path, tokenizer = places[0], Tokenizer.load(places[0])
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{path}: {tokenizer.vocab_size} ids, --vocab-size is {config.model.vocab_size} "
            f"(use --vocab-size {tokenizer.vocab_size})"
        )
    return tokenizer


class Opened(NamedTuple):
    """What is trained or evaluated on."""

    source: TokenSource
    words: str
    """A few on it, for the header."""
    talks: Sequence[Conversation] = ()
    """The conversations that the windows are made of, if they are."""


def open_data(config: Config, prefix: str, mesh: Mesh, tokenizer: Tokenizer | None) -> Opened:
    """The windows of a dataset. All ranks call it together."""
    model = config.model
    if config.data.is_conversations(prefix):
        opened = _open_pairs if config.data.prefers else _open_conversations
        return opened(config, prefix, _template_of(prefix, tokenizer))
    if prefix == "synthetic":
        source = Synthetic(model.vocab_size, model.seq_len, config.train.seed)
        return Opened(source, "synthetic Markov chain")
    dataset = IndexedDataset(prefix)
    _check_tokenizer(config, prefix)
    _check_ids(dataset, model.vocab_size, mesh)
    windows = Windows(dataset.tokens, model.seq_len, dataset.document_starts)
    if len(windows) == 0:
        raise DataError(
            f"{prefix}.bin: {len(dataset.tokens)} tokens, one sample needs --seq-len + 1 = "
            f"{model.seq_len + 1}"
        )
    apart = " kept apart" if config.data.reset_attention_mask else ""
    size = f"{count(len(dataset.tokens))} tokens, {dataset.num_documents} documents"
    return Opened(windows, f"{prefix}, {size}{apart}")


def _template_of(path: str, tokenizer: Tokenizer | None) -> Template:
    if tokenizer is None:
        raise UserError(f"--data {path}: conversations need a tokenizer (name it by --tokenizer)")
    return Template(tokenizer)


def _open_pairs(config: Config, path: str, template: Template) -> Opened:
    read = read_preferences(path)
    made = Pairs([render_pair(template, pair) for pair in read], config.model.seq_len)
    words = f"{count(len(made))} pairs of answers"
    if made.dropped:
        words += f", {made.dropped} longer than --seq-len (dropped)"
    return Opened(made, f"{path}, {words}")


def _open_conversations(config: Config, path: str, template: Template) -> Opened:
    said = read_conversations(path)
    made = Conversations(
        [template.render(conversation) for conversation in said],
        config.model.seq_len,
        pack=config.data.pack,
    )
    words = [f"{count(len(said))} conversations in {count(len(made))} samples"]
    words.append(f"{100 * made.learned_share:.0f}% of tokens learned")
    if made.cut:
        dropped = f" ({made.dropped} before the answer: dropped)" if made.dropped else ""
        words.append(f"{made.cut} cut at --seq-len{dropped}")
    return Opened(made, f"{path}, {', '.join(words)}", said)


def _check_ids(dataset: IndexedDataset, vocab_size: int, mesh: Mesh) -> None:
    """Raise DataError, on every rank, if a token does not fit; rank 0 alone reads them all."""
    wrong = DataError(f"{dataset.bin_path}: rank 0 found a token that does not fit")
    is_wrong = False
    if mesh.rank == 0:
        try:
            dataset.check_ids(vocab_size)
        except DataError as e:
            wrong, is_wrong = e, True
    if comm.any_true(is_wrong, mesh.world):
        raise wrong


def _check_tokenizer(config: Config, prefix: str) -> None:
    """Raise DataError if the data says that it was made with another tokenizer than the run's."""
    meta = Path(f"{prefix}.json")
    if not config.data.tokenizer or not meta.exists():
        return
    said = parse_json(meta.read_text(encoding="utf-8", errors="replace"), str(meta))
    claimed = said.get("tokenizer_sha256") if isinstance(said, dict) else None
    ours = Tokenizer.load(config.data.tokenizer).sha256
    if isinstance(claimed, str) and claimed != ours:
        raise DataError(
            f"{prefix}: made with tokenizer {claimed[:8]}, --tokenizer {config.data.tokenizer} is "
            f"{ours[:8]} (preprocess the text again with this one)"
        )

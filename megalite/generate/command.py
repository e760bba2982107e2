"""`megalite generate RUN PROMPT`: go on from a prompt with a checkpoint of any layout."""

from __future__ import annotations

from pathlib import Path

from megalite.checkpoint.load import Reader, load_weights
from megalite.checkpoint.manifest import Manifest, newest
from megalite.core.config import Config, run_directory
from megalite.core.errors import CheckpointError, UserError
from megalite.core.mesh import Mesh
from megalite.core.params import initialize, named_parameters
from megalite.data.chat import Message, Template
from megalite.data.tokenizer import Tokenizer
from megalite.generate.args import GenerateArgs
from megalite.generate.engine import generate as run_generation
from megalite.generate.engine import logits_of
from megalite.generate.sample import Sampling
from megalite.models.build import build_stages
from megalite.models.gpt import GPT


def load_model(path: Path) -> tuple[GPT, Config, Manifest]:
    """The whole model of a run directory or step directory, in this process."""
    directory, manifest, passed_over = newest(path)
    for reason in passed_over:
        print(f"megalite: warning: {reason}; using {directory.name}")
    config = Config.from_dict(manifest.config)
    model = untrained_model(config)
    load_weights(Reader(directory, manifest), dict(named_parameters(model)))
    return model, config, manifest


def untrained_model(config: Config) -> GPT:
    """The whole model with its initial weights."""
    stages = build_stages(
        config.model,
        Mesh({}),
        placement=(0,),
        layers=None,
        sequence_parallel=False,
        seed=config.train.seed,
    )
    initialize(stages[0], config.train.seed)
    return stages[0]


def load_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer that a run keeps beside its checkpoints."""
    path = run / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(
            f"{path}: not there (this run was trained on tokens without a tokenizer)"
        )
    return Tokenizer.load(path)


def generate(args: GenerateArgs) -> None:
    """Print `num_samples` texts."""
    how = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    path = Path(args.checkpoint)
    model, config, _ = load_model(path)
    tokenizer = load_tokenizer(run_directory(path))
    if args.top_k > config.model.vocab_size:
        raise UserError(f"--top-k {args.top_k}: the model knows {config.model.vocab_size} tokens")
    ids, stop = tokenizer.encode(args.prompt), tokenizer.eod
    if args.chat:
        template = Template(tokenizer)
        ids, stop = template.prompt([Message("user", args.prompt)]), template.end
    made = run_generation(
        logits_of(model),
        [ids] * args.num_samples,
        how,
        max_tokens=args.max_tokens,
        seq_len=config.model.seq_len,
        stop=stop,
    )
    for number, tokens in enumerate(made):
        if args.num_samples > 1:
            print(f"--- {number + 1} of {args.num_samples}")
        print(tokenizer.decode(tokens if args.chat else ids + tokens))

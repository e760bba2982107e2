"""The whole run as one frozen record. Nobody writes to it after parsing; the rest are properties.

Every field is a flag of the same name (`hidden_size` is `--hidden-size`), a key of `config.json`
and the word used in errors; the docstring under a field is its help text. Field names are unique
over all groups. Ranges and cross-field rules: core/check.py.
Not here: presets (models/presets.py), recipes (train/recipes.py), parsing (core/cli.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from megalite.core.check import check_layout, check_model, check_train
from megalite.core.check_values import check_fields
from megalite.core.errors import UserError

FILES = "files"
"""Beside the groups in config.json: path and sha256 of a user's own files. Nothing is set by it."""

FILE_NAME = "config.json"
"""Of a run's Config, in its directory."""

PathText = Annotated[str, "path"]
"""A path kept as text, as config.json has it; the command line expands its `~`."""


def run_directory(path: Path) -> Path:
    """The run that a PATH belongs to: itself, or the run of that step directory."""
    return path.parent.parent if path.name.startswith("step-") else path


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the model. GPT-2 and LLaMA are two settings of it."""

    num_layers: int = 4
    """Transformer blocks."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads (None: as many as query heads); fewer is grouped-query attention."""
    ffn_hidden_size: int | None = None
    """Width inside the MLP (None: 4 x hidden; for swiglu 8/3 x hidden, rounded up to 64s)."""
    vocab_size: int = 2048
    """Token ids; a size that tp does not divide is padded, and the padding never predicted."""
    seq_len: int = 256
    """Tokens in a training sample, and the longest position."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each half block and at the end."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    activation: Literal["gelu", "gelu-tanh", "swiglu"] = "gelu"
    """MLP nonlinearity; gelu is the exact erf form, gelu-tanh is GPT-2's."""
    bias: bool = True
    """Biases in linears and LayerNorm."""
    position: Literal["learned", "rope"] = "learned"
    """Learned absolute positions or rotary ones."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """The output head is the token table."""
    attention: str = "softmax"
    """Attention of every layer: softmax, or a class of your own as FILE.py:NAME."""
    sliding_window: int | None = None
    """Each token attends to this many last tokens, itself included (None: all)."""
    qk_norm: bool = False
    """Normalise queries and keys per head."""
    logit_soft_cap: float | None = None
    """Squash output logits to cap * tanh(logit / cap) (None: off)."""
    attention_soft_cap: float | None = None
    """Squash attention scores likewise (None: off)."""
    dropout: float = 0.0
    """Dropout on embeddings and on each half block's output."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities; above 0 takes the explicit softmax path."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the whole vocabulary; in training alone."""
    z_loss: float = 0.0
    """Weight of log(sum of exp(logits))^2, which keeps logits small; in training alone."""
    init_std: float = 0.02
    """Spread of initial weights; projections into the residual divide it by sqrt(2 x layers)."""
    mup_base_width: int | None = None
    """muP: --lr and --init-std are right at this hidden size, and stay so at any (None: off)."""
    lora_rank: int = 0
    """Learn two thin matrices of this rank beside each of --lora-targets, and nothing else (0: all
    weights)."""
    lora_alpha: float = 16.0
    """Their product counts this much, divided by the rank."""
    lora_targets: tuple[Literal["qkv", "out", "up", "down"], ...] = ("qkv", "out", "up", "down")
    """Linears of a layer that have them: attention's qkv and out, the MLP's up and down."""

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def lora(self, linear: str) -> tuple[int, float] | None:
        """Rank and scale of the adapter beside a linear, by its name; None where there is none."""
        return (
            (self.lora_rank, self.lora_alpha / self.lora_rank) if linear in self.adapted else None
        )

    @property
    def adapted(self) -> tuple[str, ...]:
        """Linears of a layer that have an adapter."""
        return self.lora_targets if self.lora_rank else ()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def width_ratio(self) -> float:
        """muP's base width over ours; 1 where it is off."""
        return 1.0 if self.mup_base_width is None else self.mup_base_width / self.hidden_size

    @property
    def attention_scale(self) -> float:
        """What inner products of queries and keys are multiplied with: muP's 1 / d is for those
        that have learned to be alike.
        """
        return self.head_dim ** (-0.5 if self.mup_base_width is None else -1.0)

    @property
    def ffn(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return (
            -(-8 * self.hidden_size // 3 // 64) * 64
            if self.activation == "swiglu"
            else 4 * self.hidden_size
        )


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How the model is cut over ranks."""

    tp: int = 1
    """Tensor parallel ranks: each matrix is cut by column or row."""
    pp: int = 1
    """Pipeline parallel ranks: each holds a run of layers."""
    cp: int = 1
    """Context parallel ranks: each holds a part of every sequence."""
    cp_form: Literal["ring", "gather", "ulysses"] = "ring"
    """Attention over cp: keys travel round a ring, are gathered, or heads are cut by all-to-all."""
    dp: int | None = None
    """Data parallel ranks (None: all ranks that tp, pp and cp leave)."""
    vpp: int = 1
    """Stages a pipeline rank holds; above 1 needs --schedule interleaved, zb-v or your own."""
    schedule: str = "1f1b"
    """Pipeline order: gpipe, 1f1b, interleaved, zb-h1, zb-h2, zb-v, FILE.py:NAME or FILE.csv."""
    post_validation: bool = False
    """Update before the gradient norm is known, as if it were not clipped, and take that back where
    it is: the next step's first forwards do not wait for all ranks. For zb-h2."""
    pp_layers: tuple[int, ...] | None = None
    """Layers of each stage, as 3,3,2,2 (None: balanced, with embedding and head counted)."""
    zero: int = 1
    """ZeRO stage: 1 cuts the optimizer state over data ranks, 2 gradients too, 3 parameters too."""
    sequence_parallel: bool = True
    """Cut norms and residuals over tp along the sequence (does nothing at tp 1)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Keep all activations; all but what cheap parts make; or only each layer's input."""
    recompute_modules: tuple[str, ...] | None = None
    """Parts selective runs again in backward (None: core-attention,norm,activation)."""
    recompute_layers: int | None = None
    """Recompute only in the first layers of each stage, this many of them (None: all)."""
    bucket_mb: float | None = None
    """Gradient bucket size in MB (None: 4 on gloo, 64 on NCCL)."""
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """How gradients are sent to be summed over data ranks: as they were added up, which is in fp32
    or more, or rounded to bf16, with half the bytes."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    data: PathText = "synthetic"
    """Prefix of a .bin/.idx pair of megalite preprocess, or synthetic: a seeded Markov chain. For
    megalite sft a .jsonl file of conversations."""
    valid_data: PathText = ""
    """The same of what is held out (empty: no held-out loss)."""
    tokenizer: PathText = ""
    """tokenizer.json to decode samples and count bytes with (empty: the one beside the data, or of
    --init-from)."""
    pack: bool = True
    """Several conversations in a sample, which do not see each other; otherwise one each, padded to
    the longest of its microbatch."""
    reset_attention_mask: bool = False
    """Documents in one sample do not see each other, and positions restart at each. The data's
    index says where documents start; a document's last token still predicts the next one's first.
    """
    dpo_beta: float = 0.0
    """How fast megalite dpo takes one answer for better than the other, by how much more likely it
    has made it than the model that it began from did (0: 0.1 there, and not for other verbs)."""

    @staticmethod
    def is_conversations(path: str) -> bool:
        """Whether a path is a file of conversations, and not the prefix of a dataset."""
        return path.endswith((".jsonl", ".jsonl.gz"))

    @property
    def talks(self) -> bool:
        """Whether it is conversations."""
        return self.is_conversations(self.data)

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether samples hold documents that do not see each other."""
        return self.reset_attention_mask or self.prefers or (self.pack and self.talks)

    @property
    def prefers(self) -> bool:
        """Whether it is pairs of answers, of which one is preferred."""
        return self.dpo_beta > 0


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    optimizer: str = "adamw"
    """Update rule: adamw, sgd, muon (the rest by adamw), or your own as FILE.py:NAME."""
    lr: float = 3e-4
    """Peak learning rate, reached after warmup_steps."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    lr_decay: Literal["cosine", "linear", "wsd", "inverse-square-root", "constant"] = "cosine"
    """Shape of the decay from the peak."""
    lr_decay_by: Literal["steps", "tokens"] = "steps"
    """Measure warmup and decay in steps or in tokens seen."""
    warmup_steps: int = 0
    """Steps of linear warmup from 0."""
    wsd_decay_share: float = 0.2
    """Share of the run that WSD spends decaying, at its end."""
    beta1: float = 0.9
    """Decay of adamw's running mean of the gradient."""
    beta2: float = 0.95
    """Decay of adamw's running mean of the squared gradient."""
    momentum: float = 0.95
    """Decay of the momentum of sgd and muon."""
    eps: float = 1e-8
    """Added to the root of the squared mean."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms and biases have none."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this (0: never)."""
    loss_scale: float = 0.0
    """What fp16 multiplies the loss with, so that small gradients do not vanish (0: dynamic)."""
    initial_loss_scale: float = 65536.0
    """The dynamic scale of the first step."""
    min_loss_scale: float = 1.0
    """The dynamic scale falls no further."""
    loss_scale_window: int = 1000
    """Steps in a row without overflow after which the dynamic scale doubles."""
    hysteresis: int = 2
    """Overflows until the dynamic scale halves; once it has, each of them halves it again."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run itself."""

    out: PathText = "runs/pretrain"
    """Run directory."""
    resume: bool = False
    """Go on from the newest valid checkpoint in --out."""
    init_from: PathText = ""
    """Start from the weights of this run or checkpoint, optimizer and data position fresh."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"
    """Number format of weights and matmuls (auto: fp32 on CPU, bf16 on GPU)."""
    seed: int = 1234
    """Names every random number of the run."""
    micro_batch_size: int = 4
    """Samples one rank runs at once."""
    global_batch_size: int = 16
    """Samples of one optimizer step, over all ranks and microbatches."""
    rampup_batch_size: tuple[int, ...] | None = None
    """Grow to it, as START,INCREMENT,SAMPLES: equal shares of that many samples at each size."""
    train_steps: int = 100
    """Optimizer steps."""
    log_interval: int = 10
    """Steps between console lines (metrics.jsonl has every step)."""
    eval_interval: int = 100
    """Steps between held-out losses and samples (0: never)."""
    eval_samples: int = 64
    """Held-out samples of a periodic evaluation; the last one uses all of them."""
    save_interval: int = 100
    """Steps between checkpoints, besides the last step (0: only the last)."""
    trace_steps: str = ""
    """Steps that RUN/trace.json shows, rank by rank, as FIRST:LAST, both of them (empty: none)."""
    sample_prompt: str = "def "
    """What the printed samples go on from."""
    ops_backend: Literal["auto", "fused", "torch", "apex"] = "auto"
    """Kernels of norms, softmax, loss and optimizer."""
    deterministic: bool = False
    """The same bits from every run of a layout on GPUs of a kind, slower; a CPU's are always so."""
    dry_run: bool = False
    """Check everything, print layout and memory, start nothing."""
    world: int | None = None
    """Ranks to assume in a dry run (None: as many as were started)."""

    @property
    def traced(self) -> range:
        """The steps of trace_steps, which `check` accepted."""
        first, _, last = self.trace_steps.partition(":")
        return range(int(first), int(last) + 1) if first else range(0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run: `config.json` is this record, and a valid starting point of another."""

    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def verb(self) -> str:
        """What trains by it: `megalite pretrain`, `sft` or `dpo`."""
        return "dpo" if self.data.prefers else "sft" if self.data.talks else "pretrain"

    def data_ranks(self, world_size: int) -> int:
        """Data parallel ranks of a world that `check` accepted."""
        lay = self.layout
        return lay.dp if lay.dp is not None else world_size // (lay.tp * lay.pp * lay.cp)

    def num_microbatches(self, world_size: int, batch: int | None = None) -> int:
        """Microbatches one rank runs in a step of `batch` samples (None: global_batch_size), of a
        world that `check` accepted.
        """
        batch = self.train.global_batch_size if batch is None else batch
        return batch // (self.train.micro_batch_size * self.data_ranks(world_size))

    def batch_sizes(self) -> range:
        """Every size a step's batch can have, in order."""
        train = self.train
        last = train.global_batch_size
        start, increment, _ = train.rampup_batch_size or (last, last, 0)
        return range(start, last + 1, increment)

    def batch_at(self, samples: int) -> int:
        """Samples of the step that starts after `samples` of the run."""
        sizes, ramp = self.batch_sizes(), self.train.rampup_batch_size
        if ramp is None:
            return sizes[-1]
        return sizes[min(len(sizes) - 1, samples * (len(sizes) - 1) // ramp[2])]

    def samples_after(self, steps: int) -> int:
        """Samples of the first `steps` steps."""
        samples, last = 0, self.train.global_batch_size
        for step in range(steps):
            batch = self.batch_at(samples)
            if batch == last:
                return samples + (steps - step) * last
            samples += batch
        return samples

    def check(self, world_size: int) -> None:
        """Raise UserError, alike on every rank, unless this can run on `world_size` ranks."""
        for group in (self.model, self.layout, self.data, self.optim, self.train):
            check_fields(group)
        check_model(self.model)
        check_train(self)
        check_layout(self, world_size)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(tree: dict[str, Any]) -> Config:
        """The Config that `to_dict` gave. Raises UserError on an unknown group or key."""
        groups = {f.name: type(getattr(Config(), f.name)) for f in dataclasses.fields(Config)}
        made: dict[str, Any] = {}
        if not isinstance(tree, dict):
            raise UserError("config: expected an object of groups")
        for name, values in tree.items():
            if name == FILES:
                continue
            if name not in groups:
                raise UserError(f"config: unknown group {name!r} (known: {', '.join(groups)})")
            if not isinstance(values, dict):
                raise UserError(f"config {name}: expected an object of fields")
            known = {f.name for f in dataclasses.fields(groups[name])}
            if extra := sorted(set(values) - known):
                raise UserError(
                    f"config {name}: unknown key {extra[0]!r} (written by another version?)"
                )
            fixed = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            made[name] = groups[name](**fixed)
        return Config(**made)

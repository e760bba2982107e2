"""`megalite pretrain`: the loop around train_step, with everything a run reads, writes and says.

Every rank walks the same lines; what differs is who prints and writes (rank 0) and who owns which
numbers. Next: build.py for what a run is made of, loop.py for one step.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import megalite
from megalite.checkpoint import manifest as mf
from megalite.checkpoint.load import Reader, load_optimizer, load_weights, newest_for_all
from megalite.checkpoint.save import check_space, remove_partial, save
from megalite.core import comm
from megalite.core import mesh as mesh_module
from megalite.core.config import FILE_NAME, FILES, Config
from megalite.core.errors import CheckpointError, UserError
from megalite.core.world import World
from megalite.data.atomic import write_json
from megalite.data.chat import CHAT_TEMPLATE, Template
from megalite.layers.linear import is_adapter
from megalite.optim.lr import learning_rate
from megalite.schedule.simulate import bubble
from megalite.train import console, flops
from megalite.train.build import (
    build_engine,
    build_loader,
    build_mesh,
    pick_device,
    pick_dtype,
    schedule_maker,
)
from megalite.train.data import find_tokenizer, open_data
from megalite.train.deterministic import be_deterministic
from megalite.train.evaluate import Evaluation, Sample, held_out
from megalite.train.exam import Exam
from megalite.train.failure import Explain, Stop, Stopped, failures_told, forget_cause
from megalite.train.metrics import Metrics, peak_memory_gb
from megalite.train.own_files import as_tree, changed_files, check_own_code, own_files
from megalite.train.pictures import draw_loss, draw_schedule, timeline
from megalite.train.preference import Preferred, read_reference, set_reference
from megalite.train.step_log import StepLog, due
from megalite.train.steps import Steps
from megalite.train.trace import Trace

LORA = ("lora_rank", "lora_alpha", "lora_targets")
TRAINING_ALONE = ("dropout", "attention_dropout", "label_smoothing", "z_loss", "init_std")
"""Fields of the model that say nothing of what its weights compute."""


def pretrain(config: Config, world: World, explain: Explain | None = None) -> None:
    """Train as `config` says; all ranks of `world` call it together.

    A rank that fails writes its traceback to logs/rank-N.log and prints one line; the others end
    silently. `explain` says what it means that memory is short.
    """
    with failures_told(config, world, explain):
        Run(config, world).train()
        mesh_module.disconnect()


class Run:
    """One run on one rank, from its files to its last line."""

    def __init__(self, config: Config, world: World):
        self.config, self.world, self.out = config, world, Path(config.train.out)
        check_own_code(config)
        if world.rank == 0:
            forget_cause(config)
        self.device = pick_device(config, world)
        if config.train.deterministic:
            be_deterministic(self.device)
        dtype = pick_dtype(config, self.device)
        self.files = own_files(config)
        self.mesh = build_mesh(config, world, self.device)
        self.stop = Stop()
        self.stop.listen()
        self.tokenizer = find_tokenizer(config)
        source, self.description, _ = open_data(config, config.data.data, self.mesh, self.tokenizer)
        self._prepare_out()
        self.engine = build_engine(config, self.mesh, device=self.device, dtype=dtype)
        self.peak = flops.peak_of(self.device, dtype)
        self.loader = build_loader(self.engine, source)
        self.evaluations: list[Evaluation] = list(self._evaluations())
        check_space(self.out, self.engine.optimizer, self.mesh)
        self.step, self.samples, self.tokens_before = self._start_point()
        self.evaluated_at: int | None = None
        self.steps = Steps(self.engine)
        self.trace = Trace(self.out, self.mesh, config.train.traced)

    def train(self) -> None:
        """Take the steps that are left, then say how it went."""
        config, train = self.config, self.config.train
        schedule = schedule_maker(config)(config.num_microbatches(self.world.size))
        share = bubble(timeline(config, schedule))
        self._say(
            *console.header(
                config, self.world.size, device=self.device, data=self.description, bubble=share
            )
        )
        if self.device.type == "cuda":
            self._say(f"  {console.flops_rule(config, self.device, self.peak)}")
        if config.data.prefers:
            self._take_reference()
        metrics = Metrics(self.out, from_step=self.step) if self._is_first else None
        self.metrics = metrics
        if metrics is not None:
            draw_schedule(self.out / "schedule.svg", config, schedule)
            metrics.board.add_scalar("perf/bubble", share, self.step)
        if self.step:
            self._say(f"resumed at step {self.step} from {self.out}/checkpoints")
            if 0 < train.traced.stop <= self.step + 1:
                self._say(f"megalite: warning: --trace-steps {train.trace_steps}: taken before")
        self.log = StepLog(
            self.engine,
            late=self.steps.late or self.device.type == "cuda",
            step=self.step,
            samples=self.samples,
            tokens=self.tokens_before,
            peak=self.peak,
            metrics=metrics,
            say=self._say,
        )
        began = time.monotonic()
        saved = self.step
        while self.step < train.train_steps:
            self.trace.enter(self.step + 1)
            asked = self._one_step()
            self.trace.leave(self.step)
            if self.step == train.traced.stop - 1:
                self._write_trace()
            last, evaluates = self.step == train.train_steps, due(self.step, train.eval_interval)
            saves = asked or last or due(self.step, train.save_interval)
            if evaluates or saves:
                self.steps.settle()
                asked |= self.log.tell()
            if evaluates:
                self._evaluate(last=last)
            if asked or saves:
                self._save()
                saved = self.step
            if asked and self.step < train.train_steps:
                self._write_trace()
                self._say_stopped(saved)
                raise Stopped(self.stop.signal_number)
        self._finish(time.monotonic() - began)

    @property
    def _is_first(self) -> bool:
        return self.mesh.rank == 0

    def _say(self, *lines: str) -> None:
        if self._is_first:
            print("\n".join(lines), flush=True)

    def _one_step(self) -> bool:
        """Take a step; whether the last one whose sums are known says to stop."""
        config = self.config
        began = time.monotonic()
        self.mesh.log.doing("data")
        batch = config.batch_at(self.samples)
        lr = self._learning_rate()
        calls = self.loader.step(self.samples, config.num_microbatches(self.world.size, batch))
        found = self.steps.take(calls, lr=lr, stop=self.stop.asked)
        self.step += 1
        self.samples += batch
        size = batch * config.model.seq_len
        return self.log.add(
            found, step=self.step, samples=self.samples, size=size, lr=lr, began=began
        )

    def _learning_rate(self) -> float:
        """Of the next step."""
        config, optim = self.config, self.config.optim
        ends = {"done": self.step + 1, "warmup": optim.warmup_steps, "step": 1}
        ends["total"] = config.train.train_steps
        spent = {name: float(steps) for name, steps in ends.items()}
        if optim.lr_decay_by == "tokens":
            length = config.model.seq_len
            spent = {name: config.samples_after(n) * float(length) for name, n in ends.items()}
            spent["done"] = float(self.log.tokens + config.batch_at(self.samples) * length)
        return learning_rate(optim, **spent)

    def _evaluate(self, *, last: bool) -> None:
        """Take every evaluation, at the end over all there is."""
        self.evaluated_at = self.step
        for evaluation in self.evaluations:
            found = evaluation.take(self.engine, last=last)
            self._say(*found.lines)
            if self.metrics is None:
                continue
            if found.numbers:
                self.metrics.write(self.step, **found.numbers)
            if found.text:
                self.metrics.text(self.step, found.text)

    def _write_trace(self) -> None:
        """Leave the trace of the steps so far, if any was asked for."""
        found = self.trace.finish(self.engine.pipeline.schedule_for)
        if found is not None:
            steps = [step for step, _, _ in self.trace.spans]
            share = sum(found.measured) / len(steps)
            self._say(
                f"trace  steps {steps[0]} to {steps[-1]} in {self.out}/trace.json | bubble "
                f"{100 * share:.1f}%, simulated with its own action times "
                f"{100 * found.predicted:.1f}%"
            )

    def _save(self) -> None:
        facts = mf.Manifest(
            step=self.step,
            samples=self.samples,
            tokens=self.log.tokens,
            optimizer_steps=self.engine.optimizer.step_count,
            config=json.loads(json.dumps(self.config.to_dict())),
            made_with={
                "megalite": megalite.__version__,
                "torch": torch.__version__,
                "device": self.device.type,
                "dtype": str(self.engine.dtype),
                "threads": torch.get_num_threads(),
                "layout": self.mesh.sizes,
                FILES: self.files,
            },
        )
        # A run may end after this, and nobody may leave while another still sends.
        self.engine.zero.settle()
        save(self.out / "checkpoints", self.engine.optimizer, self.mesh, facts)

    def _start_point(self) -> tuple[int, int, int]:
        """Load what --resume or --init-from ask for; gives step, samples and tokens so far."""
        train = self.config.train
        if self._is_first:
            remove_partial(self.out / "checkpoints")
        if not train.resume and not train.init_from:
            return 0, 0, 0
        source = self.out if train.resume else Path(train.init_from)
        directory, manifest, passed_over = newest_for_all(source, self.mesh, self.device)
        _check_same_model(self.config, manifest, directory)
        # What weights of another run were trained by is no matter; what they mean is.
        mine = (
            self.files
            if train.resume
            else {k: f for k, f in self.files.items() if k == "attention"}
        )
        changed = changed_files(manifest.made_with.get(FILES, {}), mine)
        for line in (*(f"{reason}; using {directory.name}" for reason in passed_over), *changed):
            self._say(f"megalite: warning: {line}")
        if train.resume:
            load_optimizer(Reader(directory, manifest), self.engine.optimizer)
            return manifest.step, manifest.samples, manifest.tokens
        with self.engine.zero.whole_params():
            for stage in self.engine.stages.values():
                # Adapters begin anew where the other run has none.
                theirs = {
                    name: param
                    for name, param in stage.named_parameters()
                    if not is_adapter(name) or f"weights/{name}" in manifest.tensors
                }
                load_weights(Reader(directory, manifest), theirs)
        self.engine.optimizer.read_params()
        return 0, 0, 0

    def _prepare_out(self) -> None:
        """Make the run directory. Raises UserError if it holds a run that this one is not told to
        go on with.
        """
        if not self.config.train.resume and mf.step_dirs(self.out / "checkpoints"):
            raise UserError(
                f"--out {self.out}: holds checkpoints of a run (use --resume to go on with it, or "
                "another --out)"
            )
        comm.barrier(self.mesh.world)
        if self._is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / FILE_NAME, as_tree(self.config, self.files))
            if self.tokenizer is not None:
                self.tokenizer.save(self.out / "tokenizer.json")
            if self.config.data.talks:
                (self.out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")

    def _evaluations(self) -> Iterator[Evaluation]:
        data, tokenizer = self.config.data, self.tokenizer
        if data.valid_data:
            source, _, talks = open_data(self.config, data.valid_data, self.mesh, tokenizer)
            loader = build_loader(self.engine, source)
            yield Preferred(loader) if data.prefers else held_out(loader, tokenizer)
            if talks:
                assert tokenizer is not None
                yield Exam(talks, Template(tokenizer), seq_len=self.config.model.seq_len)
        if tokenizer is not None and not data.talks:
            yield Sample(tokenizer)

    def _take_reference(self) -> None:
        """What the model that this run began from says of all pairs: asked once, then read."""
        held_out = [e.loader for e in self.evaluations if isinstance(e, Preferred)]
        loaders = dict(zip(("train", "valid"), (self.loader, *held_out), strict=False))
        if self.step:
            return read_reference(loaders, self.out)
        began = time.monotonic()
        set_reference(self.engine, loaders, self.out)
        pairs = sum(len(loader.source) for loader in loaders.values())
        self._say(f"reference of {pairs} pairs in {console.duration(time.monotonic() - began)}")

    def _say_stopped(self, saved: int) -> None:
        train = self.config.train
        name = (
            signal.Signals(self.stop.signal_number).name if self.stop.signal_number else "a signal"
        )
        self._say(
            f"stopped by {name} after step {self.step}; step {saved} is in {self.out}/checkpoints",
            f"next   the same command with --resume goes on to step {train.train_steps}",
        )
        if self.metrics is not None:
            self.metrics.close()

    def _finish(self, seconds: float) -> None:
        if self.evaluated_at != self.step:
            self._evaluate(last=True)
        train = self.config.train
        if self.metrics is None:
            return
        self.metrics.close()
        draw_loss(self.out, self.out / "loss.png")
        gigabytes = peak_memory_gb(self.device)
        self._say(
            f"done   {self.step} steps, {console.count(self.log.tokens)} tokens in "
            f"{console.duration(seconds)} | peak {1024 * gigabytes:.0f} MB/rank | "
            f"{self.out}/loss.png, {self.out}/schedule.svg"
        )
        words = ["next  "]
        if self.tokenizer is not None:
            asked = ["generate", str(self.out), f'"{train.sample_prompt}read"']
            if self.config.data.talks:
                asked = ["chat", str(self.out), "--temperature", "0"]
            words += [console.command("megalite", *asked), "|"]
        self._say(" ".join([*words, console.command("tensorboard", "--logdir", f"{self.out}/tb")]))


def _check_same_model(config: Config, manifest: mf.Manifest, directory: Path) -> None:
    """Raise CheckpointError unless the checkpoint is of the model this run has."""
    theirs = Config.from_dict(manifest.config).model
    if config.train.init_from and not config.train.resume and theirs.lora_rank == 0:
        theirs = replace(theirs, **{name: getattr(config.model, name) for name in LORA})
    for name, value in vars(theirs).items():
        mine = getattr(config.model, name)
        if mine != value and name not in TRAINING_ALONE:
            flag = "--" + name.replace("_", "-")
            raise CheckpointError(
                f"{directory}: was trained with {flag} {value}, this run has {mine}"
            )

"""`megalite <verb>`: each mistake on a command line is one line and one exit code on every rank.

`main` runs in this process, with the environment torchrun would have made; two real processes show
at the end that a second rank stays silent and that nothing was started before the refusal.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megalite
from megalite import __main__ as front
from megalite.core.config import Config
from megalite.core.world import World
from megalite.data.corpus import CorpusArgs

USER, DATA = 2, 3
PRESETS = (
    "gpt2-124m, gpt2-1.5b, gpt3-1.3b, gpt3-6.7b, gpt3-175b, gpt-1t, llama-tiny, llama-1b, "
    "llama-7b, llama3-8b, llama3-70b"
)


def environment(world, rank=0):
    """What torchrun sets for one rank of a world on one host."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


# (arguments after `pretrain`, ranks started, the one line)
LAYOUT = [
    ("--tp 2 --pp 2", 6, "layout: world size 6 is not divisible by tp*pp*cp = 2*2*1 = 4 "
     "(use --nproc-per-node 4 or 8, or change --tp or --pp)"),
    ("--tp 2 --pp 2", 2, "layout: world size 2 is not divisible by tp*pp*cp = 2*2*1 = 4 "
     "(use --nproc-per-node 4, or change --tp or --pp)"),
    ("--tp 2 --pp 2 --dp 3", 8, "--dp 3: tp*pp*cp*dp = 2*2*1*3 = 12, but the world has 8 ranks "
     "(use --dp 2, or leave it out)"),
    ("--dry-run --world 7 --tp 2", 1, "layout: world size 7 is not divisible by tp*pp*cp = "
     "2*1*1 = 2 (use --nproc-per-node 6 or 8, or change --tp or --pp)"),
    ("--world 8", 1, "--world 8: only --dry-run uses it (torchrun says how many ranks run)"),
    ("--trace-steps 3", 1, "--trace-steps 3: expected FIRST:LAST as 3:5"),
    ("--trace-steps 5:3", 1,
     "--trace-steps 5:3: the steps of this run are 1 to 100, the first named first"),
    ("--trace-steps 99:101", 2,
     "--trace-steps 99:101: the steps of this run are 1 to 100, the first named first"),
    ("--num-heads 8 --tp 3", 3,
     "--tp 3: --num-heads 8 is not divisible by 3 (allowed: 1, 2, 4, 8)"),
    ("--hidden-size 96 --num-heads 12 --num-kv-heads 6 --tp 4", 4,
     "--tp 4: no divisor and no multiple of --num-kv-heads 6 (allowed: 1, 2, 3, 6, 12)"),
    ("--ffn-hidden-size 510 --tp 4", 4,
     "--tp 4: --ffn-hidden-size 510 is not divisible by 4 (allowed: 1, 2)"),
    ("--num-heads 5", 1, "--num-heads 5: --hidden-size 128 is not divisible by 5 "
     "(allowed: 1, 2, 4, 8, 16, 32, 64, 128)"),
    ("--num-heads 8 --num-kv-heads 3", 1,
     "--num-kv-heads 3: does not divide --num-heads 8 (allowed: 1, 2, 4, 8)"),
    ("--position rope --hidden-size 12 --num-heads 4", 1,
     "--position rope: needs an even head size, but --hidden-size 12 / --num-heads 4 = 3 "
     "(change one of them, or use --position learned)"),
    ("--seq-len 255 --tp 2", 2, "--seq-len 255: sequence parallelism cuts it over --tp 2 "
     "(nearest: 254, 256; or --no-sequence-parallel)"),
    ("--global-batch-size 30", 2, "--global-batch-size 30: not a multiple of --micro-batch-size 4 "
     "* dp 2 = 8 (nearest: 24, 32)"),
    ("--global-batch-size 4", 2, "--global-batch-size 4: not a multiple of --micro-batch-size 4 "
     "* dp 2 = 8 (nearest: 8)"),
    ("--recompute-modules norm", 1,
     "--recompute-modules norm: needs --recompute selective (got none)"),
    ("--recompute full --recompute-modules norm,activation", 1,
     "--recompute-modules norm,activation: needs --recompute selective (got full)"),
    ("--recompute selective --recompute-modules norms", 1,
     "unknown --recompute-modules 'norms' (did you mean norm? known: core-attention, norm, "
     "activation)"),
    ("--recompute-layers 2", 1,
     "--recompute-layers 2: needs --recompute selective or full (got none)"),
    ("--num-layers 12 --pp 4 --pp-layers 3,3,2,2", 4,
     "--pp-layers 3,3,2,2: sums to 10, the model has 12 layers"),
    ("--num-layers 12 --pp 4 --pp-layers 6,3,3", 4,
     "--pp-layers 6,3,3: names 3 stages, but --pp 4 * --vpp 1 makes 4"),
    ("--pp 2 --pp-layers 4,0", 2, "--pp-layers 4,0: each stage needs at least 1 layer"),
    ("--pp 8", 8, "--pp 8: 8 * vpp 1 = 8 stages, but the model has 4 layers "
     "(the largest --pp is 4)"),
    ("--pp 4 --vpp 2 --schedule interleaved", 4, "--pp 4: 4 * vpp 2 = 8 stages, but the model has "
     "4 layers (the largest --pp is 2)"),
    ("--pp 2 --vpp 2", 2, "--vpp 2: needs --schedule interleaved or zb-v (got 1f1b)"),
    ("--vpp 2 --schedule interleaved", 1, "--vpp 2: needs --pp above 1 (got 1)"),
    ("--post-validation", 1,
     "--post-validation: needs --pp above 1 (got 1: no rank waits for another)"),
    ("--schedule 1f1", 1,
     "unknown --schedule '1f1' (did you mean 1f1b? known: gpipe, 1f1b, interleaved, zb-h1, zb-h2, "
     "zb-v)"),
    ("--pp 2 --schedule zb-v", 2,
     "--schedule zb-v has two stages a rank, got --vpp 1 (use --vpp 2)"),
    ("--pp 2 --schedule interleaved", 2, "--schedule interleaved has two stages a rank or more, "
     "got --vpp 1 (use --vpp 2, or --schedule 1f1b)"),
    ("--pp 2 --schedule absent.py:mine", 2,
     "--schedule absent.py: cannot be read (No such file or directory)"),
    ("--pp 2 --schedule absent.py", 2,
     "--schedule absent.py: names no function (use FILE.py:NAME, or FILE.csv)"),
    ("--mup-base-width 64 --optimizer muon", 1, "--mup-base-width 64: its learning rates are those "
     "of Adam, not of --optimizer muon (use adamw)"),
    ("--mup-base-width 0", 1, "--mup-base-width 0: must be an integer >= 1"),
    ("--valid-data synthetic", 1, "--valid-data synthetic: has no end, and is what --data "
     "synthetic trains on (use a prefix of megalite preprocess)"),
    ("--rampup-batch-size 4,4", 1,
     "--rampup-batch-size 4,4: expected START,INCREMENT,SAMPLES, each at least 1"),
    ("--rampup-batch-size 4,0,100", 1,
     "--rampup-batch-size 4,0,100: expected START,INCREMENT,SAMPLES, each at least 1"),
    ("--rampup-batch-size 4,5,100", 1, "--rampup-batch-size 4,5,100: from 4 by 5 does not come to "
     "--global-batch-size 16 (choose START below it, at a distance that INCREMENT divides)"),
    ("--rampup-batch-size 16,4,100", 1, "--rampup-batch-size 16,4,100: from 16 by 4 does not come "
     "to --global-batch-size 16 (choose START below it, at a distance that INCREMENT divides)"),
    ("--rampup-batch-size 4,4,100", 2, "--rampup-batch-size 4,4,100: a batch of 4 is no multiple "
     "of --micro-batch-size 4 * dp 2 = 8 (START and INCREMENT must be)"),
    ("--rampup-batch-size 8,4,100", 2, "--rampup-batch-size 8,4,100: a batch of 12 is no multiple "
     "of --micro-batch-size 4 * dp 2 = 8 (START and INCREMENT must be)"),
    ("--rampup-batch-size x", 1, "--rampup-batch-size x: expected integers as 3,3,2,2"),
    ("--zero 4", 2, "--zero 4: there are stages 0 to 3 (use one of them)"),
    ("--cp 2 --seq-len 254", 2, "--seq-len 254: --cp 2 --cp-form ring cut it 4 ways "
     "(nearest: 252, 256)"),
    ("--cp 3 --cp-form ulysses --seq-len 256", 3, "--seq-len 256: --cp 3 --cp-form ulysses cut it "
     "3 ways (nearest: 255, 258)"),
    ("--cp 2 --tp 4 --cp-form gather --seq-len 252", 8, "--seq-len 252: --cp 2 --cp-form gather "
     "and sequence parallelism over --tp 4 cut it 8 ways (nearest: 248, 256)"),
    ("--cp 4 --tp 2 --cp-form ulysses", 8, "--cp-form ulysses: the 2 heads of a tp rank are not "
     "divisible by --cp 4 (allowed: 1, 2; or --cp-form ring)"),
    ("--cp-form rings", 1, "--cp-form rings: expected one of ring, gather, ulysses"),
    ("--cp 2", 3, "layout: world size 3 is not divisible by tp*pp*cp = 1*1*2 = 2 "
     "(use --nproc-per-node 2 or 4, or change --tp or --pp)"),
    ("--precision fp16 --pp 2 --schedule zb-h2 --post-validation", 2,
     "--post-validation: not with --precision fp16, whose loss scale waits for the norm of the "
     "step before (leave it out, or use bf16)"),
    ("--loss-scale 1024 --precision bf16", 1,
     "--loss-scale 1024: needs --precision fp16 (got bf16)"),
    ("--precision fp16 --min-loss-scale 4 --initial-loss-scale 2", 1,
     "--min-loss-scale 4: more than --initial-loss-scale 2"),
    ("--hysteresis 0", 1, "--hysteresis 0: must be an integer >= 1"),
    ("--warmup-steps 101", 1, "--warmup-steps 101: more than --train-steps 100"),
    ("--sliding-window 0", 1, "--sliding-window 0: must be an integer >= 1"),
]  # fmt: skip

COMMAND_LINE = [
    ("--learing-rate 3e-4", "unknown option --learing-rate (did you mean --lr?)"),
    ("--lr 1 --tp 2 --lr 1", "--lr: given twice"),
    ("--lr", "--lr: needs a value"),
    ("--lr --tp 2", "--lr: needs a value"),
    ("--lr abc", "--lr abc: expected a number"),
    ("--lr nan", "--lr nan: must be a finite number > 0"),
    ("--lr inf", "--lr inf: must be a finite number > 0"),
    ("--lr 1e400", "--lr 1e400: must be a finite number > 0"),
    ("--lr -1e-4", "--lr -1e-4: must be a finite number > 0"),
    ("--lr 0", "--lr 0: must be a finite number > 0"),
    ("--tp 0", "--tp 0: must be an integer >= 1"),
    ("--tp 1.5", "--tp 1.5: expected an integer"),
    ("--tp 99999999999", "--tp 99999999999: must be at most 2147483647"),
    ("--dropout 1", "--dropout 1: must be a finite number in [0, 1)"),
    ("--beta2 1", "--beta2 1: must be a finite number in [0, 1)"),
    ("--wsd-decay-share 0", "--wsd-decay-share 0: must be a finite number in (0, 1]"),
    ("--seed -1", "--seed -1: must be an integer >= 0"),
    ("--pp-layers 3,x", "--pp-layers 3,x: expected integers as 3,3,2,2"),
    ("--device gpu", "--device gpu: expected one of auto, cpu, cuda"),
    ("--resume=yes", "--resume: takes no value (use --resume or --no-resume)"),
    ("--reset-attention-mask=1",
     "--reset-attention-mask: takes no value (use --reset-attention-mask or "
     "--no-reset-attention-mask)"),
    ("--reset-attention-mask true", "unexpected argument 'true' (see megalite pretrain --help)"),
    ("--reset-attention-masks",
     "unknown option --reset-attention-masks (did you mean --reset-attention-mask?)"),
    ("--out ''", "--out: must not be empty"),
    ("--data ''", "--data: must not be empty"),
    ("junk", "unexpected argument 'junk' (see megalite pretrain --help)"),
    ("--model gpt2", f"unknown --model 'gpt2' (did you mean gpt2-124m? known: {PRESETS})"),
    ("--recipe dem", "unknown --recipe 'dem' (did you mean demo? known: demo, chat, prefer)"),
    ("--recipe demo --config x", "--recipe: not together with --config (both are a whole run)"),
    ("--config absent", "--config absent: No such file or directory"),
    ("--config text.txt",
     "--config text.txt: not JSON (Expecting value: line 1 column 1 (char 0))"),
    ("--config other.json", "--config other.json: config: unknown group 'lr' "
     "(known: model, layout, data, optim, train)"),
    ("--out text.txt", "--out text.txt: is a file, a run needs a directory"),
    ("--out text.txt/run", "--out text.txt/run: cannot write in text.txt"),
    ("--init-from absent", "--init-from absent: no such run or checkpoint directory"),
]  # fmt: skip

# Told by the rooms behind the door: code is loaded, and it needs torch.
OWN_CODE = [
    ("--optimizer adam", 2, "unknown --optimizer 'adam' (did you mean adamw? known: adamw, sgd, "
     "muon, FILE.py:NAME)"),
    ("--dry-run --optimizer adam", 1, "unknown --optimizer 'adam' (did you mean adamw? known: "
     "adamw, sgd, muon, FILE.py:NAME)"),
    ("--optimizer absent.py:Mine", 1,
     "--optimizer absent.py: cannot be read (No such file or directory)"),
    ("--optimizer text.txt:Mine", 1, "unknown --optimizer 'text.txt:Mine' (known: adamw, sgd, "
     "muon, FILE.py:NAME)"),
    ("--attention absent.py:Mine", 1,
     "--attention absent.py: cannot be read (No such file or directory)"),
]  # fmt: skip

MISSING_DATA = [
    ("--data absent", "--data absent: no file absent.bin (make it with megalite preprocess)"),
    ("--valid-data text", "--valid-data text: no file text.bin (make it with megalite preprocess)"),
    ("--tokenizer absent",
     "--tokenizer absent: no such file (make it with megalite tokenizer train)"),
]  # fmt: skip

GENERATE = [
    ("", "CHECKPOINT: is required (see megalite generate --help)"),
    ("run", "PROMPT: is required (see megalite generate --help)"),
    ("run ''", "PROMPT: must not be empty"),
    ("run def --temperature nan", "--temperature nan: must be a finite number >= 0"),
    ("run def --temperature -1", "--temperature -1: must be a finite number >= 0"),
    ("run def --top-p 1.7", "--top-p 1.7: must be a finite number in (0, 1]"),
    ("run def --top-p 0", "--top-p 0: must be a finite number in (0, 1]"),
    ("run def --top-k -1", "--top-k -1: must be an integer >= 0"),
    ("run def --num-samples 0", "--num-samples 0: must be an integer >= 1"),
    ("run def --max-tokens -3", "--max-tokens -3: must be an integer >= 1"),
    ("run def --seed 1.5", "--seed 1.5: expected an integer"),
    ("run def more", "unexpected argument 'more' (see megalite generate --help)"),
    ("run def --min-p 2", "--min-p 2: must be a finite number in [0, 1]"),
    ("run def --repetition-penalty 0", "--repetition-penalty 0: must be a finite number > 0"),
    ("run def --temprature 1", "unknown option --temprature (did you mean --temperature?)"),
]

CHAT = [
    ("", "chat: name a run directory or --url, one of the two"),
    ("run --url http://127.0.0.1:1", "chat: name a run directory or --url, one of the two"),
    ("--url ftp://there", "--url ftp://there: expected http://HOST:PORT or https://HOST"),
    (
        "--url http://127.0.0.1:1 --token-file absent",
        "--token-file absent: No such file or directory",
    ),
    (
        "--url http://127.0.0.1:1 --token-file other.bin",
        "--token-file other.bin: the token must be ASCII",
    ),
    (
        "--url http://127.0.0.1:1 --token-file other.json",
        "--token-file other.json: expected one token, in one line",
    ),
    (
        "--url http://there:port",
        "--url http://there:port: Port could not be cast to integer value as 'port'",
    ),
]

SERVE = [
    ("", "CHECKPOINT: is required (see megalite serve --help)"),
    ("run --host 0.0.0.0",
     "--host 0.0.0.0: anybody who reaches this address could use the model "
     "(name a --token-file, or leave --host at 127.0.0.1)"),
    ("run --token-file absent", "--token-file absent: No such file or directory"),
    ("run --token-file text.txt",
     "--token-file text.txt: the token must be 32 characters or more "
     "(make one with: openssl rand -hex 32)"),
    ("run --tls-cert text.txt", "--tls-cert and --tls-key: one is nothing without the other"),
    ("run --slots 0", "--slots 0: must be an integer >= 1"),
    ("run --max-seconds 0", "--max-seconds 0: must be a finite number > 0"),
]  # fmt: skip

KNOWN_VERBS = (
    "corpus, conversations, tokenizer, preprocess, pretrain, sft, dpo, verify, inspect, convert, "
    "generate, chat, serve"
)
VERBS = [
    ("pretain", f"unknown verb 'pretain' (did you mean pretrain? known: {KNOWN_VERBS})"),
    ("tokenizer", "tokenizer: use tokenizer train or show"),
    ("tokenizer learn", "tokenizer: unknown tokenizer verb 'learn'; use tokenizer train or show"),
    ("--lr 3", f"unknown verb '--lr' (known: {KNOWN_VERBS})"),
]  # fmt: skip

ROWS = (
    [(f"pretrain {argv}", world, text, USER) for argv, world, text in LAYOUT + OWN_CODE]
    + [(f"pretrain {argv}", 1, text, USER) for argv, text in COMMAND_LINE]
    + [(f"pretrain {argv}", 1, text, DATA) for argv, text in MISSING_DATA]
    + [(f"generate {argv}", 1, text, USER) for argv, text in GENERATE]
    + [(f"chat {argv}", 1, text, USER) for argv, text in CHAT]
    + [(f"serve {argv}", 1, text, USER) for argv, text in SERVE]
    + [(argv, 1, text, USER) for argv, text in VERBS]
)


def split(line):
    """The words of a row; '' is the empty one."""
    return ["" if word == "''" else word for word in line.split()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with one text file and one JSON file that is no config; nothing of torchrun."""
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "other.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "other.json").write_text('{"lr": 1}')
    monkeypatch.chdir(tmp_path)
    for name in environment(1):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def loaded(monkeypatch):
    """The calls that the front door hands over, instead of the rooms behind it."""
    calls = []
    monkeypatch.setattr(
        front, "_load", lambda place: lambda *args: calls.append((place.partition(":")[2], *args))
    )
    return calls


@pytest.mark.parametrize("line, world, text, code", ROWS, ids=[row[0] for row in ROWS])
def test_mistake_is_one_line_and_its_exit_code(line, world, text, code, here, monkeypatch, capsys):
    if world > 1:
        for name, value in environment(world).items():
            monkeypatch.setenv(name, value)
    assert front.main(split(line)) == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"megalite: error: {text}\n")


LAUNCH = [
    ({"RANK": "0"}, "launch: RANK is set but WORLD_SIZE is not"),
    ({"WORLD_SIZE": "2"}, "launch: WORLD_SIZE is set but RANK is not"),
    ({**environment(2), "RANK": "two"}, "launch: RANK='two' is not a count"),
    ({**environment(2), "WORLD_SIZE": "-2"}, "launch: WORLD_SIZE='-2' is not a count"),
    ({**environment(2), "RANK": "2"}, "launch: RANK=2 does not fit in WORLD_SIZE=2"),
    ({**environment(2), "LOCAL_WORLD_SIZE": "3"},
     "launch: LOCAL_WORLD_SIZE=3 does not fit in WORLD_SIZE=2"),
]  # fmt: skip


@pytest.mark.parametrize("variables, text", LAUNCH)
def test_half_an_environment_is_refused(variables, text, here, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert front.main(["pretrain"]) == USER
    line = f"megalite: error: {text} (start ranks with examples/launch.sh or torchrun)\n"
    assert capsys.readouterr().err == line


def test_host_has_one_speaker_and_each_host_has_one(here, monkeypatch, capsys):
    for name, value in (environment(4, rank=3) | {"LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    said = []
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        front.main(["pretrain", "--lr", "0"])
        said.append(capsys.readouterr().err.count("\n"))
    assert said == [1, 0]


def test_layout_of_many_ranks_prints_how_to_start_them(here, loaded, capsys):
    code = front.main(["pretrain", "--tp", "2", "--dp=3", "--global-batch-size", "12"])
    argv = "pretrain --tp 2 --dp=3 --global-batch-size 12"
    assert (code, loaded) == (USER, [])
    assert capsys.readouterr().err.splitlines() == [
        "megalite: error: the layout needs 6 ranks, and this is one process; run one of",
        f"  examples/launch.sh 6 {argv}",
        f"  torchrun --standalone --nproc-per-node 6 -m megalite {argv}",
    ]


def test_pretrain_gets_config_and_world(here, loaded, monkeypatch):
    assert front.main(["pretrain"]) == 0
    for name, value in environment(2, rank=1).items():
        monkeypatch.setenv(name, value)
    assert front.main(["pretrain"]) == 0
    there = World(rank=1, size=2, local_rank=1, local_size=2, launched=True)
    assert [call[:3] for call in loaded] == [
        ("pretrain", Config(), World()),
        ("pretrain", Config(), there),
    ]
    loaded[0][3]()
    assert loaded[-1] == ("explain",)


@pytest.mark.parametrize(
    "argv, ranks", [("--world 64 --global-batch-size 64", 64), ("", 4), ("--dp 2", 8)]
)
def test_dry_run_needs_no_ranks(argv, ranks, here, loaded):
    assert front.main(["pretrain", "--dry-run", "--tp=2", "--pp=2", *split(argv)]) == 0
    assert [(call[0], call[2]) for call in loaded] == [("dry_run", ranks)]


def test_one_process_verb_refuses_torchrun(here, monkeypatch, capsys):
    for name, value in environment(2).items():
        monkeypatch.setenv(name, value)
    assert front.main(["corpus"]) == USER
    line = "megalite: error: corpus: is one process, but WORLD_SIZE=2 (run it without torchrun)\n"
    assert capsys.readouterr().err == line


def test_corpus_is_told_where_this_python_keeps_its_library(here, monkeypatch):
    seen: list[CorpusArgs] = []
    monkeypatch.setattr("megalite.data.corpus.build_corpus", seen.append)
    assert front.main(["corpus", "--out", "there"]) == 0
    assert (seen[0].out, (Path(seen[0].stdlib) / "json/decoder.py").is_file()) == ("there", True)


@pytest.mark.parametrize(
    "trouble, code, line",
    [
        (KeyboardInterrupt(), 130, "megalite: interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (
            PermissionError(13, "Not yours", "a/b"),
            5,
            "megalite: error: a/b: Not yours\n",
        ),
    ],
)
def test_trouble_behind_the_door_ends_in_its_exit_code(trouble, code, line, monkeypatch, capfd):
    def fail(argv, environment):
        raise trouble

    monkeypatch.setattr(front, "_run", fail)
    assert front.main([]) == code
    assert capfd.readouterr().err == line


def test_overview_names_every_verb(capsys):
    assert front.main(["--help"]) == 0
    assert front.main([]) == USER
    shown = capsys.readouterr().out
    for name, verb in front.VERBS.items():
        assert shown.count(f"\n  {name} ") == 2 and shown.count(verb.about) == 2


def test_version(capsys):
    front.main(["--version"])
    assert capsys.readouterr().out == f"megalite {megalite.__version__}\n"


DRIVER = """
import contextlib, io, json, sys
from megalite.__main__ import main
rows = []
for argv in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(argv)
    rows.append([code, said.getvalue()])
print(json.dumps([rows, "torch" in sys.modules]))
"""


def started(command, rank):
    root = str(Path(megalite.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    surroundings = {**os.environ, **environment(2, rank), "PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, *command],
        env=surroundings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_ranks_refuse_alike_and_the_first_one_speaks_before_torch_is_imported(here):
    loads = {f"pretrain {argv}" for argv, _, _ in OWN_CODE}
    alike = [r for r in ROWS if r[0].startswith("pretrain") and r[1] in (1, 2)]
    alike = [row for row in alike if row[0] not in loads]
    argv = json.dumps([split(row[0]) for row in alike])
    ranks = [started(["-c", DRIVER, argv], rank) for rank in (0, 1)]
    (first, has_torch), (second, _) = [json.loads(p.communicate(timeout=60)[0]) for p in ranks]
    assert not has_torch
    assert [code for code, _ in first] == [code for code, _ in second]
    for row, (code, said), (_, silence) in zip(alike, first, second, strict=True):
        assert code == row[3] and said.count("\n") == 1 and silence == "", row[0]


def test_real_command_on_two_ranks_prints_one_line(here):
    ranks = [started(["-m", "megalite", "pretrain", "--lr", "nan"], rank) for rank in (0, 1)]
    said = [(p.communicate(timeout=60), p.returncode) for p in ranks]
    line = "megalite: error: --lr nan: must be a finite number > 0\n"
    assert said == [(("", line), USER), (("", ""), USER)]


@pytest.mark.parametrize("verb", ["pretrain", "tokenizer train"])
def test_help_does_not_wait_for_torch(verb, here):
    program = (
        "import sys\nfrom megalite.__main__ import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    sys.exit(9 if 'torch' in sys.modules else stop.code)"
    )
    helped = started(["-c", program, *verb.split(), "--help"], 0)
    out, err = helped.communicate(timeout=60)
    assert (helped.returncode, err) == (0, "") and f"usage: megalite {verb}" in out

"""The conversation in the terminal: what the model is told, what a slash does, and how it stops."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megalite.core.errors import UserError
from megalite.data.chat import Message, Template, read_conversations
from megalite.serve.chat import HELP, Talk, answers_of
from megalite.serve.talk_args import ChatArgs, Drawing
from tests.unit.data.samples import make_tokenizer


class Echo:
    """Answers with the last words of what it was told, in two pieces."""

    def __init__(self):
        self.told, self.how, self.closed = [], [], 0

    def __call__(self, messages, how):
        self.told.append([(m.role, m.content) for m in messages])
        self.how.append(how)
        try:
            yield "you said "
            if messages[-1].content == "stop me":
                raise KeyboardInterrupt
            yield messages[-1].content
        finally:
            self.closed += 1


@pytest.fixture
def talk(monkeypatch, capsys):
    """`talk(lines, **args)`: what the model was asked, and what was printed."""

    def run(*lines, **args):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", read)
        echo = Echo()
        Talk(echo, ChatArgs(**args)).run()
        return echo, capsys.readouterr().out

    return run


def test_model_is_told_the_whole_conversation(talk):
    echo, out = talk("hello", "again", system="be kind")
    assert echo.told == [
        [("system", "be kind"), ("user", "hello")],
        [
            ("system", "be kind"),
            ("user", "hello"),
            ("assistant", "you said hello"),
            ("user", "again"),
        ],
    ]
    assert out.splitlines()[:2] == ["you said hello", "you said again"]


def test_reset_forgets_and_system_is_told_from_then_on(talk):
    echo, _ = talk("one", "/reset", "/system answer briefly", "two")
    assert echo.told[1] == [("system", "answer briefly"), ("user", "two")]


def test_interrupt_stops_the_answer_and_keeps_what_came(talk):
    echo, out = talk("stop me", "and now")
    assert "you said  (stopped)" in out and echo.closed == 2
    assert echo.told[1][:2] == [("user", "stop me"), ("assistant", "you said ")]


def test_settings_change_by_name_within_their_ranges(talk):
    echo, out = talk(
        "/temp 0", "/set top-k 5", "/set top_p 2", "/set colour red", "/temp warm", "now"
    )
    assert echo.how == [Drawing(temperature=0.0, top_k=5)]
    assert "(--top-p 2.0: must be a finite number in (0, 1])" in out
    assert "(colour: no such setting (known: max_tokens, temperature," in out
    assert "(temperature warm: expected a number)" in out


def test_retry_asks_the_last_question_again(talk):
    echo, out = talk("/retry", "first", "second", "/retry")
    assert "(there is no question yet)" in out
    assert echo.told[2] == echo.told[1]


def test_saved_conversation_is_one_that_sft_reads(talk, tmp_path):
    path = tmp_path / "talk.jsonl"
    talk("h\u00e9llo", f"/save {path}", "more", f"/save {path}", system="be kind")
    first, second = read_conversations(path)
    assert first == (
        Message("system", "be kind"),
        Message("user", "h\u00e9llo"),
        Message("assistant", "you said h\u00e9llo"),
    )
    assert len(second) == 5
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


def test_unknown_command_and_unwritable_file_are_said_and_the_talk_goes_on(talk, tmp_path):
    echo, out = talk("/dance", "hello", f"/save {tmp_path}", "/help", "/quit", "never")
    assert "(/dance: no such command (/help lists them))" in out
    assert f"({tmp_path}: Is a directory)" in out and HELP in out
    assert len(echo.told) == 1


def test_oldest_messages_are_left_out_where_the_context_ends(capsys):
    tokenizer, asked = make_tokenizer(600), []
    template = Template(tokenizer)

    def texts(ids, how, end):
        asked.append(ids)
        yield 0, "yes"

    model = SimpleNamespace(
        tokenizer=tokenizer,
        texts=texts,
        saved=SimpleNamespace(model=SimpleNamespace(seq_len=60)),
    )
    answer = answers_of(model)
    system = Message("system", "short")
    talk = [Message("user", "one " * 9), Message("assistant", "two"), Message("user", "three")]
    assert list(answer([system, *talk], Drawing())) == ["yes"]
    assert asked == [template.prompt([system, talk[2]])]
    assert "the first 2 messages are left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="tokens do not fit into the model's context of 60"):
        answer([Message("user", "word " * 80)], Drawing())

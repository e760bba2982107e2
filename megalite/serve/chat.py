"""`megalite chat`: a conversation in the terminal, with a run or with a server.

What is typed goes to the model, except for lines that begin with a slash. Ctrl-C stops an answer,
of which what came stays in the conversation. What answers is a function of messages and settings:
a model of ours, or an OpenAI-compatible server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Callable, Generator
from pathlib import Path

from megalite.core.check_values import check_fields
from megalite.core.errors import UserError
from megalite.data.chat import Message, Template
from megalite.serve.client import Server
from megalite.serve.model import Model, opened
from megalite.serve.talk_args import ChatArgs, Drawing

Answers = Callable[[list[Message], Drawing], Generator[str]]
"""What the assistant says after these messages, in pieces; closing it stops it."""

HELP = """\
/reset            begin anew        /system [TEXT]   say, or set, what the model is told before
/temp NUMBER      the temperature   /save FILE       add the conversation to FILE, one JSON line
/set NAME VALUE   another setting   /retry           answer the last question again
/help             this              /quit            leave (Ctrl-D, too)"""


def chat(args: ChatArgs) -> None:
    """Talk until the input ends."""
    if bool(args.checkpoint) == bool(args.url):
        raise UserError("chat: name a run directory or --url, one of the two")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() edits and remembers lines when it is there)
    if args.url:
        server = Server(args.url, token_file=args.token_file, ca_file=args.ca_file)
        print(f"{args.url}: {server.model()}; /help lists what else can be typed")
        Talk(server.answer, args).run()
        return
    with opened(Path(args.checkpoint), args, slots=1) as model:
        answers = answers_of(model)
        print(f"{model.saved.directory}; /help lists what else can be typed")
        Talk(answers, args).run()


def answers_of(model: Model) -> Answers:
    """A model's answers. What no longer fits into its context is left out, the oldest first."""
    template, longest = Template(model.tokenizer), model.saved.model.seq_len

    def answer(messages: list[Message], how: Drawing) -> Generator[str]:
        told = [m for m in messages if m.role == "system"]
        rest = [m for m in messages if m.role != "system"]
        ids = template.prompt(told + rest)
        left_out = 0
        while len(ids) >= longest and len(rest) > 1:
            # A question goes with its answer.
            left_out, rest = left_out + 2, rest[2:]
            ids = template.prompt(told + rest)
        if len(ids) >= longest:
            raise UserError(f"{len(ids)} tokens do not fit into the model's context of {longest}")
        if left_out:
            print(f"(the context is {longest} tokens: the first {left_out} messages are left out)")
        return (piece for _, piece in model.texts(ids, how, end=template.end))

    return answer


class Talk:
    """One conversation and its settings."""

    def __init__(self, answers: Answers, args: ChatArgs):
        self.answers, self.system, self.said = answers, args.system, list[Message]()
        names = [field.name for field in dataclasses.fields(Drawing)]
        self.how = Drawing(**{name: getattr(args, name) for name in names})

    def run(self) -> None:
        """Read lines and answer them."""
        while True:
            try:
                line = input("you> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            try:
                if line.startswith("/"):
                    if not self.obey(line):
                        return
                elif line:
                    self.ask(Message("user", line))
            except UserError as error:
                print(f"({error})")

    def ask(self, question: Message) -> None:
        """Put a question, and print the answer as it comes."""
        system = [Message("system", self.system)] if self.system else []
        answer = ""
        with contextlib.closing(self.answers([*system, *self.said, question], self.how)) as pieces:
            try:
                for piece in pieces:
                    answer += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print(" (stopped)", end="")
            finally:
                print()
        self.said += [question, Message("assistant", answer)]

    def obey(self, line: str) -> bool:
        """Do what a line that begins with a slash says; whether to go on."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return False
        if name == "/help":
            print(HELP)
        elif name == "/reset":
            self.said.clear()
        elif name == "/system":
            self.system = rest or self.system
            print(f"(system: {self.system or 'nothing'})")
        elif name == "/temp":
            self.set("temperature", rest)
        elif name == "/set":
            self.set(*rest.partition(" ")[::2])
        elif name == "/save":
            self.save(rest)
        elif name == "/retry":
            if not self.said:
                raise UserError("there is no question yet")
            question, _ = self.said[-2:]
            del self.said[-2:]
            self.ask(question)
        else:
            raise UserError(f"{name}: no such command (/help lists them)")
        return True

    def set(self, name: str, value: str) -> None:
        """Change a setting by the name of its flag."""
        known = {f.name: f for f in dataclasses.fields(Drawing)}
        field = known.get(name.strip("-").replace("-", "_"))
        if field is None:
            raise UserError(f"{name or 'nothing'}: no such setting (known: {', '.join(known)})")
        kind = type(getattr(self.how, field.name))
        try:
            how = dataclasses.replace(self.how, **{field.name: kind(value.strip())})
        except ValueError:
            raise UserError(f"{field.name} {value or 'nothing'}: expected a number") from None
        check_fields(how)
        self.how = how

    def save(self, name: str) -> None:
        """Add the conversation to a file that `megalite sft` reads."""
        if not name or not self.said:
            raise UserError("/save FILE, after a question")
        system = [Message("system", self.system)] if self.system else []
        row = {"messages": [{"role": m.role, "content": m.content} for m in [*system, *self.said]]}
        try:
            with open(name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{name}: {error.strerror}") from None
        print(f"(saved; megalite sft --data {shlex.quote(name)} would learn from it)")

"""Conversations: read from JSONL, and turned into tokens by one template.

The template is ChatML's: `<|im_start|>role`, a line end, the content, `<|im_end|>`, a line end. The
same as Jinja, for other programs, is CHAT_TEMPLATE. What is learned is what the assistant says, the
end token included: without it a model never stops. Text in a content that spells a special token
stays text. How conversations become training samples: packing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from megalite.core.errors import DataError
from megalite.data.documents import find_inputs, read_objects
from megalite.data.strict_json import kind_of, quote
from megalite.data.tokenizer import Tokenizer, replace_surrogates

START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
T = TypeVar("T")
FORMS = {
    ("prompt", "completion"): (),
    ("prompt", "response"): (),
    ("instruction", "output"): ("input",),
}
"""Fields of a line that is one question and its answer, and those that it may have besides."""
# In one line: Jinja takes away the line end after a block.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What `render` does, as Hugging Face's chat templates have it."""


class Message(NamedTuple):
    """What one side says."""

    role: str
    """One of ROLES."""
    content: str


Conversation = tuple[Message, ...]


class Rendered(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    learned: list[bool]
    """Which of them the model is to say."""


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a .jsonl or .jsonl.gz file, or of a directory of them.

    A line is an object with `messages`, a list of `role` and `content`; or with the fields of one
    of FORMS. Raises DataError, with file and line, for anything else.
    """
    return read_lines(path, conversation_of, what="conversation")


def read_lines(path: str | Path, make: Callable[[Any, str], T], *, what: str) -> list[T]:
    """What `make` makes of each line of .jsonl files, and of where it stands."""
    files = find_inputs(path)
    plain = [file for file in files if file.suffix == ".txt"]
    if plain:
        raise DataError(f"{plain[0]}: a {what} is a line of .jsonl or .jsonl.gz")
    found = [make(entry, where) for where, entry in read_objects(files)]
    if not found:
        raise DataError(f"{path}: no {what} inside")
    return found


def conversation_of(entry: Any, where: str) -> Conversation:
    """The conversation of one line; `where` is what an error begins with."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: the line is {kind_of(entry)}, expected an object")
    if "messages" in entry:
        return check_messages(messages_of(entry["messages"], where), where)
    for (question, answer), more in FORMS.items():
        if question in entry and answer in entry:
            asked = [text_of(entry, name, where) for name in (question, *more) if name in entry]
            user = Message("user", "\n".join(text for text in asked if text))
            return (user, Message("assistant", text_of(entry, answer, where)))
    has = ", ".join(quote(key) for key in list(entry)[:5]) or "none"
    forms = " or ".join(["messages", *(" and ".join(names) for names in FORMS)])
    raise DataError(f"{where}: expected the fields {forms} (it has: {has})")


def messages_of(messages: Any, where: str) -> Conversation:
    """The messages of a JSON list."""
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages is {kind_of(messages)}, expected a list")
    found = []
    for number, message in enumerate(messages, start=1):
        at = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{at} is {kind_of(message)}, expected an object")
        role = text_of(message, "role", at)
        if role not in ROLES:
            raise DataError(f"{at}: role {quote(role)} (known: {', '.join(ROLES)})")
        found.append(Message(role, text_of(message, "content", at)))
    return tuple(found)


def check_messages(found: Conversation, where: str) -> Conversation:
    """The same messages. Raises DataError unless the assistant speaks, after another."""
    if not any(m.role == "assistant" for m in found):
        raise DataError(f"{where}: the assistant says nothing, so nothing is learned")
    if found[0].role == "assistant":
        raise DataError(f"{where}: the assistant speaks first (nothing asks it)")
    return found


def text_of(entry: dict[str, Any], name: str, where: str) -> str:
    """The text in a field. Raises DataError, beginning with `where`, if there is none."""
    if name not in entry:
        raise DataError(f"{where}: no field {quote(name)}")
    if not isinstance(entry[name], str):
        raise DataError(
            f"{where}: field {quote(name)} is {kind_of(entry[name])}, expected a string"
        )
    return replace_surrogates(entry[name])


class Template:
    """Renders conversations with one tokenizer. Raises DataError if it lacks START or END."""

    def __init__(self, tokenizer: Tokenizer):
        for name in (START, END):
            if name not in tokenizer.special:
                raise DataError(
                    f"the tokenizer has no {name}, which conversations need "
                    "(megalite tokenizer train makes one that has)"
                )
        self.tokenizer = tokenizer
        self.start, self.end = tokenizer.special[START], tokenizer.special[END]
        self.line_end = tokenizer.encode("\n")

    def render(self, conversation: Sequence[Message]) -> Rendered:
        """The tokens of a whole conversation."""
        ids: list[int] = []
        learned: list[bool] = []
        for role, content in conversation:
            head = self._head(role)
            # Trimmed, so that no word reaches across the line end before it.
            said = [*self.tokenizer.encode(content.strip()), self.end]
            ids += [*head, *said, *self.line_end]
            learned += [False] * len(head)
            learned += [role == "assistant"] * len(said)
            learned += [False] * len(self.line_end)
        return Rendered(ids, learned)

    def prompt(self, conversation: Sequence[Message]) -> list[int]:
        """The tokens after which the assistant speaks."""
        return [*self.render(conversation).ids, *self._head("assistant")]

    def _head(self, role: str) -> list[int]:
        return [self.start, *self.tokenizer.encode(f"{role}\n")]

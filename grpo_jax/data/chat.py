"""Chat templates: a user's text as the tokens that an instruction-tuned model was trained to answer. Imports no jax.

A template is a jinja2 program that came with the model, so it is not trusted: it is rendered in jinja2's sandbox, in a
process with limits on time, memory and output (limited_process.py), and only once per run, around a sentinel in the user's
place. What stands before and after the sentinel is then plain text, and a prompt is ``before + text + after``.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.data.limited import limited
from grpo_jax.data.tokenizers import HFTokenizer, read_settings
from grpo_jax.files import read_bounded

TEMPLATE_CHARACTERS = 100_000  # the longest known has some 20,000

# Quotes, markup, capitals, line ends and two scripts: a template that escapes, cuts or recases the user's text changes it.
_SENTINEL = "Qz<b>'\"&\\{{7}}é日\n\n\tx  |sentinel| " + "0123456789 " * 400 + "Zq"
_PADDINGS = ("", " \n\t\u3000", "\u3000\t\n ")  # so that strip(), strip(" ") and strip("\n") differ


class Frame(NamedTuple):
    """What a template writes around a user's text: ``before``, ``after``, and the sides of the text that it strips."""

    before: str
    after: str
    strips_left: bool
    strips_right: bool


class ChatFormat:
    """Encodes a user's text within a chat template: the template's special tokens are ids, those in the text stay text.

    The ids are those of the whole text with its special tokens parsed and none added (what ``apply_chat_template`` of
    transformers gives), unless the user's text itself holds the text of a special token. Then the stretch between the
    template's last special token before it and the next one after it is encoded with special tokens off. A BOS is there if
    and only if the template writes it.
    """

    def __init__(self, tokenizer: HFTokenizer, frame: Frame) -> None:
        self.frame = frame
        self._tokenizer = tokenizer
        (head, spans), (tail, tail_spans) = tokenizer.parse(frame.before), tokenizer.parse(frame.after)
        specials = [i for i, token in enumerate(head) if token in tokenizer.special_ids]
        tail_specials = [i for i, token in enumerate(tail) if token in tokenizer.special_ids]
        self._head = head[: specials[-1] + 1] if specials else []
        self._tail = tail[tail_specials[0] :] if tail_specials else []
        self._open = frame.before[spans[specials[-1]][1] :] if specials else frame.before
        self._close = frame.after[: tail_spans[tail_specials[0]][0]] if tail_specials else frame.after

    def encode(self, text: str) -> list[int]:
        """Ids of the prompt; ValueError for a text that is empty (once stripped, if the template strips) or not Unicode."""
        text = text.lstrip() if self.frame.strips_left else text
        text = text.rstrip() if self.frame.strips_right else text
        if not text:
            raise ValueError("the user's text is empty")
        whole = self._tokenizer.parse(self.frame.before + text + self.frame.after)[0]
        if self._specials(whole) == self._specials(self._head + self._tail):
            return whole
        pieces = [*self._head, *self._tokenizer.encode(self._open + text + self._close), *self._tail]
        # An <unk> that stands for a character outside the vocabulary is in both.
        return whole if self._specials(whole) == self._specials(pieces) else pieces

    def _specials(self, ids: list[int]) -> list[int]:
        return [i for i in ids if i in self._tokenizer.special_ids]


def read_chat(
    tokenizer: HFTokenizer, *, system: str | None = None, arguments: Mapping[str, Any] | None = None
) -> ChatFormat:
    """The chat format of the tokenizer's folder.

    Args:
      tokenizer: of the folder.
      system: the system prompt, or None for a conversation without one (a template may then write its own).
      arguments: further variables of the template, ``{"enable_thinking": False}`` say; JSON values.

    Raises:
      ValueError: no template, one that is refused (see `frame_of`), a system prompt that holds a special token, or an
        argument that changes nothing.
    """
    if system is not None and set(tokenizer.parse(system)[0]) & tokenizer.special_ids:
        raise ValueError(f"the system prompt {system[:60]!r} holds the text of a special token")
    tokens = {f"{kind}_token": tokenizer.token(kind) for kind in ("bos", "eos", "pad", "unk")}
    variables = {name: token for name, token in tokens.items() if token is not None}
    source, template = _read_template(tokenizer.folder)
    variables |= dict(arguments or {})
    try:
        frame = frame_of(template, system=system, arguments=variables)
        for name in arguments or {}:
            if not _depends(template, system, variables, name, frame):
                raise ValueError(f"the chat template does not depend on {name}: leave it unset")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return ChatFormat(tokenizer, frame)


def frame_of(template: str, *, system: str | None = None, arguments: Mapping[str, Any] | None = None) -> Frame:
    """What a chat template writes around a user's text, the assistant's turn opened.

    Args:
      template: jinja2, with the functions that transformers gives it: ``raise_exception``, ``strftime_now`` (always of 26
        July 2024, so that a run does not depend on the day), ``tojson``, loop controls, ``{% generation %}``.
      system: the system prompt, if any.
      arguments: further variables of the template.

    Raises:
      ValueError: a template that is too long, fails, takes more than 2 s of CPU time, 512 MB or 1,000,000 characters, or
        does anything else with the user's text than to write it once, stripped or not, or leaves out the system prompt.

    >>> frame_of("{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}[assistant]")
    Frame(before='[user]', after='[end][assistant]', strips_left=True, strips_right=True)
    """
    if len(template) > TEMPLATE_CHARACTERS:
        raise ValueError(f"the chat template has {len(template)} characters, more than {TEMPLATE_CHARACTERS}")
    if clash := {"messages", "add_generation_prompt"} & set(arguments or {}):
        raise ValueError(f"the chat template's variables {sorted(clash)} are not for arguments to set")

    # The same conversation around a short text, and around a sentinel with three kinds of space at its sides.
    first = [] if system is None else [{"role": "system", "content": system}]
    texts = ["user", *(padding + _SENTINEL + padding[::-1] for padding in _PADDINGS)]
    conversations = [[*first, {"role": "user", "content": text}] for text in texts]
    variables = {"add_generation_prompt": True, "tools": None, "documents": None, **(arguments or {})}
    short, *rendered = _render(template, conversations, variables)

    # What stands around the sentinel must be the same each time.
    parts = [text.split(_SENTINEL) for text in rendered]
    if any(len(pieces) != 2 for pieces in parts):
        raise ValueError(
            "the chat template does not write the user's text once and as it is (or only stripped): such a template cannot "
            "be used"
        )
    before, after = parts[0]
    left = _strips(_PADDINGS, [pieces[0].removeprefix(before) for pieces in parts])
    right = _strips([padding[::-1] for padding in _PADDINGS], [pieces[1].removesuffix(after) for pieces in parts])
    if left is None or right is None or short != before + "user" + after:
        raise ValueError("the chat template writes other things around one user's text than around another's")
    if system is not None and system.strip() not in before and system.strip() not in after:
        raise ValueError(f"the chat template does not write the system prompt {system[:60]!r}")
    return Frame(before, after, left, right)


def _depends(template: str, system: str | None, variables: dict[str, Any], name: str, frame: Frame) -> bool:
    """Whether a frame would be another without a variable, or with another value: one may be set to what it is by default."""
    value = variables[name]
    without = {key: other for key, other in variables.items() if key != name}
    for others in (without, without | {name: not value if isinstance(value, bool) else f"{value}?"}):
        try:
            if frame_of(template, system=system, arguments=others) != frame:
                return True
        except ValueError:  # it cannot do without
            return True
    return False


def _strips(paddings: Sequence[str], rendered: Sequence[str]) -> bool | None:
    """Whether a template strips one side of the user's text, from what it makes of spaces there; None: something else."""
    if list(rendered) == list(paddings):
        return False
    return None if any(rendered) else True


def _read_template(folder: Path) -> tuple[Path, str]:
    """The template of a folder and its file: chat_template.jinja, else the entry of one of two JSON files."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path, read_bounded(path, 4 * TEMPLATE_CHARACTERS).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from None
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        template = read_settings(path).get("chat_template")
        if isinstance(template, list):
            entries = [entry for entry in template if isinstance(entry, dict) and "name" in entry]
            templates = {entry["name"]: entry.get("template") for entry in entries}
            if "default" not in templates:
                raise ValueError(
                    f"{path}: of the chat templates {sorted(map(str, templates))}, none is named 'default'"
                )
            template = templates["default"]
        if template is not None:
            if not isinstance(template, str):
                raise ValueError(f"{path}: its chat_template is a {type(template).__name__}, not a text")
            return path, template
    raise ValueError(f"{folder}: no chat template in chat_template.jinja or tokenizer_config.json")


def _render(template: str, conversations: Sequence[Any], variables: Mapping[str, Any]) -> list[str]:
    if importlib.util.find_spec("jinja2") is None:
        raise ValueError("chat templates need the package jinja2: pip install 'jinja2>=3.1.6'")
    try:
        return limited("render", template=template, conversations=conversations, variables=dict(variables))
    except ValueError as error:
        raise ValueError(f"the chat template was not rendered: {error}") from None

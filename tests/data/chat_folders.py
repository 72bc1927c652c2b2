"""Small model folders with chat templates, and the golden ids that transformers gives for them.

The templates are short ones of our own that use what those of the named families use. To make golden_chat.json again, in an
environment that has transformers (5.23.0 made the one here):

    python -m tests.data.chat_folders
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

GOLDEN = Path(__file__).with_name("golden_chat.json")
SENTENCE = "user assistant system model What is the sum of and How many You are a helpful answer Alice has apples"
WORDS = SENTENCE.split()

CHATML = """{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful model.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' }}
    {%- if message.content is string %}{{ message.content | trim }}{% endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
INSTRUCTIONS = """{{ bos_token }}{% set ns = namespace(system='') %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set ns.system = message['content'] + '\\n\\n' %}
        {% continue %}
    {% endif %}
    {% if message['role'] == 'user' %}{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}{% endif %}
    {% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{% endfor %}
"""


def make_folders(root: Path) -> dict[str, Path]:
    """Writes the folders, one per way of tokenizing and templating, and returns them by name."""
    ends, headers = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<|start_header_id|>", "<|end_header_id|>")
    llama = ("<|begin_of_text|>", "<|eot_id|>", *headers)
    turns = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    made = {  # tokenizer, bos, eos, template
        "chatml": (_byte_level(ends), None, ends[2], CHATML),
        "headers": (_byte_level(llama, bos=llama[0]), llama[0], llama[1], HEADERS),
        "turns": (_pieces(turns, "<bos>", prepend=False), "<bos>", "<eos>", TURNS),
        "prepended": (_pieces(("<s>", "</s>"), "<s>", prepend=True), "<s>", "</s>", INSTRUCTIONS),
        "metaspace": (_unigram(("<s>", "</s>", "[INST]", "[/INST]")), "<s>", "</s>", INSTRUCTIONS),
        "unknown": (_unigram((*ends, "<unk>"), byte_fallback=False), None, ends[2], CHATML),
    }
    folders = {}
    for name, (tokenizer, bos, eos, template) in made.items():
        config = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
        files = {"tokenizer_config": config | {"chat_template": template}}
        folders[name] = write_folder(root / name, json.loads(tokenizer.to_str()), files)
    return folders


def write_folder(folder: Path, layout: Any, files: dict[str, Any] | None = None) -> Path:
    """tokenizer.json and further JSON files."""
    folder.mkdir(exist_ok=True)
    for name, entries in {"tokenizer": layout, **(files or {})}.items():
        (folder / f"{name}.json").write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return folder


def _merged(pieces: list[str], words: list[str]) -> models.BPE:
    """A BPE that knows the pieces, and builds each word from its left."""
    merges = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    vocabulary = list(dict.fromkeys([*pieces, *(c for word in words for c in word), *(a + b for a, b in merges)]))
    return models.BPE(
        {c: i for i, c in enumerate(vocabulary)}, list(dict.fromkeys(merges)), byte_fallback="<0x00>" in pieces
    )


def _byte_level(specials: tuple[str, ...], bos: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(
        _merged(sorted(pre_tokenizers.ByteLevel.alphabet()), [*WORDS, *("Ġ" + w for w in WORDS), "ĊĊ"])
    )
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"\p{L}+| \p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        added = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A $B", [(bos, tokenizer.token_to_id(bos))])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, added])
    return tokenizer


def _pieces(specials: tuple[str, ...], bos: str, *, prepend: bool) -> Tokenizer:
    """SentencePiece as a BPE with byte fallback; of old a space is put before every stretch of text."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(_merged(pieces, [*WORDS, *("▁" + w for w in WORDS), "\n\n", "[INST]/:?.,"]))
    tokenizer.model.unk_token = "<unk>"
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(specials))
    ids = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A $B", ids)
    return tokenizer


def _unigram(specials: tuple[str, ...], *, byte_fallback: bool = True) -> Tokenizer:
    characters = sorted({*"▁\n?.,:/[]0123456789", *(c for word in WORDS for c in word)})
    pieces = [("<unk>", 0.0), *((c, -8.0 - 0.01 * i) for i, c in enumerate(characters))]
    pieces += [(f"<0x{i:02X}>", -20.0) for i in range(256 if byte_fallback else 0)]
    pieces += [(mark + word, -4.0 - 0.03 * i) for i, word in enumerate(WORDS) if len(word) > 1 for mark in ("▁", "")]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


TEXTS = (
    "How many apples has Alice?",
    "  What is the sum of 12 and 30?\n\n",
    "\n\nthe answer",
    "answer\u3000",
    "1/2 <think> of </think> 日本 é e\u0301 😀\0",
    "a [INST_] b <|im_ends|> <s / [/inst] <bos",
    "?" * 50,
)
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "chatml": ({}, {"system": "You are a system."}, {"arguments": {"enable_thinking": False}}),
    "headers": ({"arguments": {"date_string": "1 Jan 2026"}}, {"system": " Be. ", "arguments": {"date_string": "x"}}),
    "turns": ({},),
    "prepended": ({}, {"system": "You are a model"}),
    "metaspace": ({}, {"system": "You are a model"}),
    "unknown": ({},),
}


def main() -> None:
    """Writes what transformers gives for every folder, setting and text."""
    from transformers import PreTrainedTokenizerFast

    golden: dict[str, list[list[list[int]]]] = {}
    with tempfile.TemporaryDirectory() as root:
        for name, folder in make_folders(Path(root)).items():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            golden[name] = []
            for setting in SETTINGS[name]:
                system = [{"role": "system", "content": setting["system"]}] if "system" in setting else []
                arguments = {"add_generation_prompt": True, "return_dict": False, **setting.get("arguments", {})}
                asked = ([*system, {"role": "user", "content": text}] for text in TEXTS)
                golden[name].append([tokenizer.apply_chat_template(messages, **arguments) for messages in asked])
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(ids)}" for name, ids in golden.items())
    GOLDEN.write_text("{\n" + rows + "\n}\n")


if __name__ == "__main__":
    main()

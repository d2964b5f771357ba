"""Chat templates written from published rules, and a small tokenizer that knows their special tokens.

None is a copy: each is a short template that follows its family's rules, for the tests to hold masks against.
What is an assumption, rather than a rule that is published, says so.
"""

# ruff: noqa: RUF001 (the bars of DeepSeek's tokens are wide ones)

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

# Qwen3's published rules: ChatML; the tools in the system turn, inside <tools>; calls as JSON inside
# <tool_call>, one after another on lines of their own; runs of tool results inside one user turn, each in
# <tool_response>; thoughts come as `reasoning_content` or are parsed out of the text, and stay only after the
# last question that is not a tool result; the last turn gets a think block even when it has no thoughts; with
# thinking off the generation prompt ends in an empty block, with thinking on it does not open one.
QWEN3 = r"""
{%- if tools or messages[0].role == 'system' %}{{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
    {%- if tools %}{{- ('\n\n' if messages[0].role == 'system' else '') + '# Tools\n<tools>' }}
        {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}{{- '\n</tools>' }}
    {%- endif %}{{- '<|im_end|>\n' }}
{%- endif %}
{%- set at = namespace(question=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not m.content.startswith('<tool_response>') %}
        {%- set at.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}
        {%- set text, thought = m.content, m.reasoning_content or '' %}
        {%- if not thought and '</think>' in text %}
            {%- set thought = text.split('</think>')[0].split('<think>')[-1] %}
            {%- set text = text.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > at.question and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- set text = text.lstrip('\n') %}
        {%- endif %}
        {{- text }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n' if text or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

# Gemma-4's published rules: turns open with <|turn>ROLE and close with <turn|>; roles system, user, model;
# texts are stripped of outer white space; <|think|> in the system turn switches thinking on; thoughts have a
# channel, which history drops; tools, calls and results have special tokens of their own, with <|"|> around
# strings; calls and results stay inside one model turn, and <|tool_response>, one of the stop tokens, is what
# the target writes after a call. The non-thinking generation prompt ends in an empty thought channel.
# Assumptions: thoughts given as `reasoning_content` are written with tool calls after the last question only,
# and text beside tool calls comes after them. The declarations of tools are shortened to their names.
GEMMA4 = r"""
{%- macro value(v) -%}
    {%- if v is string -%}<|"|>{{ v }}<|"|>
    {%- elif v is boolean -%}{{ 'true' if v else 'false' }}
    {%- elif v is mapping -%}{ {{- fields(v) -}} }
    {%- elif v is sequence -%}[{%- for item in v -%}{{ value(item) }}{{ ',' if not loop.last }}{%- endfor -%}]
    {%- else -%}{{ v }}
    {%- endif -%}
{%- endmacro -%}
{%- macro fields(v) -%}
    {%- for key, item in v | dictsort -%}{{ key }}:{{ value(item) }}{{ ',' if not loop.last }}{%- endfor -%}
{%- endmacro -%}
{%- macro unthought(text) -%}
    {%- for part in text.split('<channel|>') -%}{{ part.split('<|channel>')[0] }}{%- endfor -%}
{%- endmacro -%}
{{- bos_token }}
{%- if enable_thinking or tools or messages[0].role == 'system' %}{{- '<|turn>system\n' }}
    {{- '<|think|>\n' if enable_thinking else '' }}
    {{- messages[0].content | trim if messages[0].role == 'system' else '' }}
    {%- for tool in tools or [] %}{{- '<|tool>declaration:' + tool.function.name + '<tool|>' }}{%- endfor %}
    {{- '<turn|>\n' }}
{%- endif %}
{%- set at = namespace(question=0, open=false) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{%- set at.question = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- set at.open = false %}{{- '<|turn>user\n' + (m.content | trim) + '<turn|>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '' if at.open else '<|turn>model\n' }}
        {%- if m.reasoning_content and m.tool_calls and loop.index0 > at.question %}
            {{- '<|channel>thought\n' + m.reasoning_content + '\n<channel|>' }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '<|tool_call>call:' + call.function.name + '{' + fields(call.function.arguments) }}
            {{- '}<tool_call|>' }}
        {%- endfor %}
        {%- set at.open = m.tool_calls | length > 0 %}
        {%- if at.open and not loop.last and loop.nextitem.role == 'tool' %}
        {%- else %}{{- unthought(m.content) | trim }}{{- '<|tool_response>' if at.open else '<turn|>\n' }}
        {%- endif %}
    {%- elif m.role == 'tool' %}
        {{- '<|tool_response>response:' + (m.name or 'unknown') + '{value:' + value(m.content) }}
        {{- '}<tool_response|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not at.open %}{{- '<|turn>model\n' }}
    {{- '' if enable_thinking else '<|channel>thought\n<channel|>' }}
{%- endif %}"""

# Llama-2's published rules: a turn is <s>[INST] question [/INST] answer </s>, markup in plain text, texts
# stripped; the system prompt stands in the first question. All that follows [/INST] is the target's, its
# space too.
LLAMA2 = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- for m in (messages if system is none else messages[1:]) %}
    {%- if m.role == 'user' %}{{- bos_token + '[INST] ' }}
        {{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system is not none else '' }}
        {{- m.content | trim + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + ' ' + eos_token }}
    {%- else %}{{- raise_exception('only user and assistant roles are supported') }}
    {%- endif %}
{%- endfor %}"""

# Mistral's published rules (v3): one <s>; [INST] and [/INST] are tokens; answers begin with a space; calls
# are JSON after [TOOL_CALLS]. The system prompt, which goes into the last question, is left out here.
MISTRAL = r"""
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + ({'content': m.content} | tojson) + '[/TOOL_RESULTS]' }}
    {%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
            {{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
    {%- else %}{{- raise_exception('unknown role') }}
    {%- endif %}
{%- endfor %}"""

# gpt-oss's published rules (harmony): messages with channels; the generation prompt is <|start|>assistant,
# after which the target writes its channel; thoughts (`thinking`) are the analysis channel, which history
# drops once there is a final answer; the last answer ends in <|return|>, earlier ones in <|end|>, calls in
# <|call|>. Channel markup inside a text is refused. The system message is shortened, and has no date.
HARMONY = r"""
{{- '<|start|>system<|message|>You are a helper.\n\n# Valid channels: analysis, commentary, final.<|end|>' }}
{%- set at = namespace(call='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {{- '<|start|>developer<|message|># Instructions\n\n' + m.content + '\n\n<|end|>' }}
    {%- elif m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>functions.' + at.call + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- (m.content | tojson) + '<|end|>' }}
    {%- else %}
        {%- for text in (m.content, m.thinking or '') if '<|channel|>' in text %}
            {{- raise_exception('You have passed a message containing <|channel|> tags.') }}
        {%- endfor %}
        {%- set later = namespace(final=false) %}
        {%- for other in messages[loop.index:] if other.role == 'assistant' and not other.tool_calls %}
            {%- set later.final = true %}
        {%- endfor %}
        {%- set last = loop.last and not add_generation_prompt %}
        {%- if m.thinking and (last or m.tool_calls and not later.final) %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {%- if m.tool_calls %}
            {%- set at.call = m.tool_calls[0].function.name %}
            {{- '<|start|>assistant to=functions.' + at.call + '<|channel|>commentary json<|message|>' }}
            {{- (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
            {{- '<|return|>' if last else '<|end|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

# DeepSeek-V3.1's published rules: no line ends; the switch is called `thinking`; the generation prompt opens
# the thoughts, or closes them at once; history has a closed block before each answer, and no thoughts.
DEEPSEEK = r"""
{{- bos_token }}{{- messages[0].content if messages[0].role == 'system' else '' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' %}
        {{- '<｜Assistant｜></think>' + m.content.split('</think>', 1)[-1] + eos_token }}
    {%- elif m.role != 'system' %}{{- raise_exception('unknown role') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
{%- endif %}"""

# ChatML with a thinking switch: history is written exactly as it was said.
CHATML = r"""
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

SPECIAL = {
    QWEN3: ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    CHATML: ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    LLAMA2: ("<unk>", "</s>", "<s>"),
    MISTRAL: (
        *("<unk>", "</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    HARMONY: (
        *("<|endoftext|>", "<|return|>", "<|startoftext|>", "<|start|>", "<|end|>", "<|message|>"),
        *("<|channel|>", "<|constrain|>", "<|call|>"),
    ),
    DEEPSEEK: ("<｜▁pad▁｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    GEMMA4: (
        *("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", '<|"|>'),
        *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    ),
}
# Qwen3's markup has tokens of its own that are not special: decoding does not skip them. So have
# DeepSeek's roles.
MARKUP = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<｜User｜>", "<｜Assistant｜>"),
)
LEARNT = [
    "user\n\nassistant\n\n\nthe answer the answer is is four",
    " Pear Pear? An oak, a pear. ab ba  2 22",
]
TIKTOKEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = r"\s*[\r\n]+|\s?\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+"
FAMILIES = (
    *("byte-level", "byte-level prefix space", "metaspace first", "metaspace always", "metaspace never"),
    *("prepend", "wordpiece", "tiktoken"),
)
"""Ways to split text, each that of many published tokenizers. The middle four are SentencePiece's, converted:
"prepend" is Llama-2's, which puts a space before every text between special tokens."""


def backend_of(family: str) -> Tokenizer:
    """A tokenizer of that family without special tokens. All but "wordpiece" give back every text."""
    if family == "wordpiece":
        pieces = sorted({c for text in LEARNT for c in text.strip()} | set(map(chr, range(33, 127))))
        words = ["[UNK]", *pieces, *(f"##{c}" for c in pieces), "the", "answer", "is", "##ear", "user"]
        found = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        found.decoder = decoders.WordPiece(cleanup=False)
        return found
    found = Tokenizer(BPE(ignore_merges=family == "tiktoken"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if family in ("byte-level", "byte-level prefix space", "tiktoken"):
        split = pre_tokenizers.Split(Regex(TIKTOKEN if family == "tiktoken" else SPLITS), "isolated")
        prefix = family == "byte-level prefix space"
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=prefix)
        found.pre_tokenizer = byte_level if prefix else pre_tokenizers.Sequence([split, byte_level])
        found.decoder = decoders.ByteLevel()
    else:
        scheme = family.removeprefix("metaspace ")
        if scheme == "prepend":
            spaces = normalizers.Replace(" ", "▁")
            found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        else:
            found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
        plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        found.decoder = decoders.Sequence([*plain, *strip])
        alphabet = ["▁", "\n", *map(chr, range(33, 127))]
    trainer = BpeTrainer(
        vocab_size=400 if family == "tiktoken" else 320,
        initial_alphabet=sorted(alphabet),
        min_frequency=1,
        show_progress=False,
    )
    words = [word for text in LEARNT for word in re.findall(r"\s?\S+|\s+", text)]
    found.train_from_iterator(LEARNT * 3 if found.pre_tokenizer else words * 3, trainer)
    if len(alphabet) < 200:  # what has no piece of its own is spelt in bytes
        state = json.loads(found.to_str())
        vocabulary = state["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        state["model"]["byte_fallback"] = True
        found = Tokenizer.from_str(json.dumps(state))
    return found


def tokenizer_for(template: str, family: str = "byte-level", **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with merges, also of line ends (texts joined tokenise otherwise than apart), and the
    template's special tokens."""
    backend, special = backend_of(family), SPECIAL[template]
    backend.add_special_tokens(list(special))
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    options = {"pad_token": special[0], "eos_token": special[1], "bos_token": special[2]} | options
    if template in (QWEN3, CHATML):
        options |= {"eos_token": special[2], "bos_token": None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **options)

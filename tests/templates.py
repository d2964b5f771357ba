"""Chat templates written from published rules, and a small tokenizer that knows their special tokens.

None is a copy: each is a short template that follows its family's rules, for the tests to hold masks against.
What is an assumption, rather than a rule that is published, says so.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
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

SPECIAL = {
    QWEN3: ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    GEMMA4: (
        *("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", '<|"|>'),
        *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    ),
}
# Qwen3's markup has tokens of its own that are not special: decoding does not skip them.
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, also of line ends: texts joined tokenise otherwise than apart."""
    bpe = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s?\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    bpe.train_from_iterator(["user\n\nassistant\n\n\nthe answer the answer is is four"] * 3, trainer)
    special = SPECIAL[template]
    bpe.add_special_tokens(list(special))
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    options: dict[str, Any] = {"pad_token": special[0], "eos_token": special[1], "bos_token": special[2]}
    if template is QWEN3:
        options = {"pad_token": special[0], "eos_token": special[2]}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **options)

"""Train the pocket target: its tokenizer, then its weights.

`python -m tools.pocket build` runs this. It resumes from its last checkpoint, and with the same `corpus_hash`
and number of threads it repeats the same steps.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from deepspec.files import JsonlWriter, alone_in, atomic_directory, atomic_file
from deepspec.log import note, progress
from tools.pocket import corpus

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|mask|>")
# How Qwen2 and Qwen3 split text before byte-pair merges; servers recognise the tokenizer by this behaviour.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ChatML with a thinking switch. If it is on, the generation prompt opens a think block; else it writes an
# empty one.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{{- message.content + '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- else %}
{{- '<think>\\n' }}
{%- endif %}
{%- endif %}
"""


@dataclass(frozen=True)
class BuildSettings:
    """The settings of a build. Sizes are in tokens unless the name says otherwise."""

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 12
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    longest_document: int = 384
    width_multiple: int = 16
    micro_tokens: int = 1536
    micro_batches: int = 3
    total_tokens: int = 8_755_200
    matrix_lr: float = 4e-3
    embedding_lr: float = 4e-3
    thinking_share: float = 0.2
    shares: tuple[float, ...] = (0.34, 0.38, 0.28)  # math, code, chat
    seed: int = 0

    @property
    def step_tokens(self) -> int:
        return self.micro_tokens * self.micro_batches

    @property
    def steps(self) -> int:
        return self.total_tokens // self.step_tokens


def train_tokenizer(settings: BuildSettings) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the three domains, with Qwen2's splitting and a ChatML template."""
    bpe = Tokenizer(models.BPE(byte_fallback=False))
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    some_math = itertools.islice(corpus.math_examples(settings.seed), 4000)
    examples = itertools.chain(some_math, corpus.code_examples(), corpus.chat_examples())
    bpe.train_from_iterator((e.question + "\n" + e.answer for e in examples if not e.held_out), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|mask|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def render(example: corpus.Example, thinking: bool) -> str:
    """An example as the chat template writes it, with its thinking block."""
    block = f"<think>\n{example.thought}\n</think>\n\n" if thinking else "<think>\n\n</think>\n\n"
    answer = example.thoughtful_answer if thinking else example.answer
    return (
        f"<|im_start|>user\n{example.question}<|im_end|>\n"
        f"<|im_start|>assistant\n{block}{answer}<|im_end|>\n<|endoftext|>"
    )


def documents(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """An endless stream of training examples as token ids; domains are mixed by their shares of tokens."""
    rng = random.Random(seed)
    library = {
        "code": [e for e in corpus.code_examples() if not e.held_out],
        "chat": [e for e in corpus.chat_examples() if not e.held_out],
    }

    def endless(domain: str) -> Iterator[corpus.Example]:
        if domain == "math":
            yield from (e for e in corpus.math_examples(rng.getrandbits(60)) if not e.held_out)
        while True:
            rng.shuffle(library[domain])
            yield from library[domain]

    streams = {domain: endless(domain) for domain in corpus.DOMAINS}
    spent = dict.fromkeys(corpus.DOMAINS, 0)
    while True:
        domain = min(corpus.DOMAINS, key=lambda d: spent[d] / settings.shares[corpus.DOMAINS.index(d)])
        ids = tokenizer.encode(render(next(streams[domain]), rng.random() < settings.thinking_share))
        spent[domain] += len(ids)
        yield ids


def micro_batches(stream: Iterator[list[int]], settings: BuildSettings, pad: int) -> Iterator[torch.Tensor]:
    """Micro-batches of right-padded ids [B, S], each of about `micro_tokens`.

    Documents of similar length share a micro-batch, so that there is little padding and short documents do
    not pay for the attention of long ones. There are only a few distinct shapes, so the CPU's matrix kernels
    are reused.
    """
    waiting: dict[int, list[list[int]]] = {}
    for document in stream:
        if len(document) > settings.longest_document:
            continue
        width = -(-len(document) // settings.width_multiple) * settings.width_multiple
        group = waiting.setdefault(width, [])
        group.append(document)
        if (len(group) + 1) * width > settings.micro_tokens:
            ids = torch.full((len(group), width), pad)
            for row, ready in enumerate(group):
                ids[row, : len(ready)] = torch.tensor(ready)
            del waiting[width]
            yield ids


def new_model(settings: BuildSettings) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
        dtype="float32",
    )
    torch.manual_seed(settings.seed)
    return Qwen3ForCausalLM(config)


def optimizers(model: Qwen3ForCausalLM, settings: BuildSettings) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=settings.matrix_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=settings.embedding_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """The factor on the learning rate: a linear warm-up over 2% of the steps, then linear decay to zero."""
    warm = max(1, steps // 50)
    return min((step + 1) / warm, (steps - step) / (steps - warm))


def loss_sum(model: Qwen3ForCausalLM, ids: torch.Tensor, pad: int) -> torch.Tensor:
    """The sum of nats over the predicted tokens; the last token of a document (`pad`) counts once."""
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = torch.where((ids[:, 1:] == pad) & (ids[:, :-1] == pad), -100, ids[:, 1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def build(out: Path, settings: BuildSettings, *, checkpoint_every: int = 100) -> None:
    """Train the pocket target in `out`, or continue. Raises UserError if another process trains there."""
    with alone_in(out, "building"):
        _build_in(out, settings, checkpoint_every)


def _build_in(out: Path, settings: BuildSettings, checkpoint_every: int) -> None:
    tokenizer_dir, state_path = out / "tokenizer", out / "state.pt"
    if not tokenizer_dir.exists():
        trained = train_tokenizer(settings)
        with atomic_directory(tokenizer_dir) as folder:
            trained.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = new_model(settings)
    opts = optimizers(model, settings)
    first = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(opts, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first = state["step"]
        note(f"resuming {out} at step {first} of {settings.steps}")
    pad = tokenizer.pad_token_id
    stream = micro_batches(documents(settings, tokenizer, settings.seed), settings, pad)
    stream = itertools.islice(stream, first * settings.micro_batches, None)
    base_lrs = [settings.matrix_lr, settings.embedding_lr]
    began, seen, running = time.monotonic(), 0, math.nan
    with (
        JsonlWriter(out / "metrics.jsonl") as log,
        progress("training the pocket target", settings.steps) as bar,
    ):
        bar.update(completed=first)
        for step in range(first, settings.steps):
            micro = list(itertools.islice(stream, settings.micro_batches))
            factor = learning_rate_factor(step, settings.steps)
            for optimizer, lr in zip(opts, base_lrs, strict=True):
                optimizer.param_groups[0]["lr"] = lr * factor
            tokens, nats = sum(int((ids != pad).sum()) for ids in micro), 0.0
            for ids in micro:
                loss = loss_sum(model, ids, pad) / tokens
                loss.backward()
                nats += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in opts:
                optimizer.step()
                optimizer.zero_grad()
            seen += tokens
            running = nats if math.isnan(running) else 0.97 * running + 0.03 * nats
            rate = seen / (time.monotonic() - began)
            bar.update(loss=running, **{"tokens/s": rate})
            if step % 10 == 0:
                log.write({"step": step, "loss": nats, "tokens_per_s": rate})
            if (step + 1) % checkpoint_every == 0 or step + 1 == settings.steps:
                log.sync()
                optimisers = [o.state_dict() for o in opts]
                with atomic_file(state_path) as stream_out:
                    torch.save(
                        {"model": model.state_dict(), "optimizers": optimisers, "step": step + 1}, stream_out
                    )
                note(f"step {step + 1} of {settings.steps}, loss {running:.3f}, {rate:.0f} tokens/s: saved")
    with atomic_directory(out / "target") as target:
        save_target(model, tokenizer, target, settings)


def save_target(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, settings: BuildSettings
) -> None:
    """Fill a Hugging Face model directory. Tensors are stored in bf16, at half the size; the config asks for
    float32 arithmetic."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    facts = {"settings": asdict(settings), "corpus_hash": corpus.corpus_hash()}
    (out / "pocket.json").write_text(json.dumps(facts, indent=1) + "\n")

"""The Python API: ``load`` a model by path or Hub id, then ``generate`` or ``stream`` text from it."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.weights import fuse_projections
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.checkpoint.peft import load_adapter
from idlm_jax.checkpoint.source import find_mask_token, parse_dtype
from idlm_jax.config import ModelConfig
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.decoding.generate import DecodeStats, Decoding, Emission, SamplingParams, stats_from_history
from idlm_jax.decoding.text import Piece, TextBuilder
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, str]
# A text to continue, a chat as OpenAI-style messages, or token ids.
Prompt = str | Sequence[Message] | Sequence[int]

# Rounds between two looks at the text, when somebody waits for it or a stop string may end it.
ROUNDS_PER_LOOK = 8


@dataclass(frozen=True)
class Generation:
    """One finished answer."""

    text: str
    token_ids: list[int]
    # "stop" (end token or stop string) or "length".
    finish_reason: str
    prompt_tokens: int
    # What was really used; the seed, if none was given, was drawn.
    sampling: SamplingParams
    stats: DecodeStats
    # Decoding of the whole batch, without prefill and compilation; and those.
    seconds: float
    start_seconds: float


class LanguageModel:
    """A model, its tokenizer, and maybe an adapter."""

    def __init__(self, model: Qwen3, tokenizer: "PreTrainedTokenizerFast", has_adapter: bool):
        self.model = model
        self.tokenizer = tokenizer
        self.has_adapter = has_adapter

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; chats go through the tokenizer's chat template, ready for the answer."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt).input_ids)
        if prompt and isinstance(prompt[0], Mapping):
            if not self.tokenizer.chat_template:
                raise UserError("this model has no chat template; give a plain text prompt")
            text = self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return [int(token) for token in prompt]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        decode: DecodeConfig | None = None,
        **overrides: object,
    ) -> list[Generation]:
        """Answer one prompt or a batch of prompts of any lengths; always returns a list.

        ``sampling`` is one for all or one each. ``decode`` and keyword arguments named like its fields (``stride``,
        ``layout``, ``coupling``, ``gated``) say how: the text follows the same distribution whatever they are, and with
        ``coupling="gumbel"`` it is the same text. Raises UserError for requests that cannot run.
        """
        batch = [prompts] if _is_single(prompts) else list(prompts)
        run = _Run(self, batch, sampling, decode, overrides)
        for _ in run:
            pass
        return run.generations()

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        decode: DecodeConfig | None = None,
        **overrides: object,
    ) -> Iterator[Piece | Generation]:
        """Answer one prompt piece by piece, as text is committed; the last item is the finished Generation."""
        run = _Run(self, [prompt], sampling, decode, overrides, looks=True)
        for pieces in run:
            yield from pieces[0]
        yield run.generations()[0]


class _Run:
    """One call of generate or stream: iterating it decodes, yielding the new pieces of every request."""

    def __init__(
        self,
        owner: LanguageModel,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        decode: DecodeConfig | None,
        overrides: Mapping[str, object],
        looks: bool = False,
    ):
        if not prompts:
            raise UserError("no prompts given")
        for name in overrides:
            if name not in DecodeConfig.__dataclass_fields__:
                raise TypeError(f"unexpected keyword argument '{name}'")
        self.decode = replace(decode or DecodeConfig(), **overrides)
        shared = sampling or SamplingParams(
            temperature=self.decode.temperature, top_k=self.decode.top_k, top_p=self.decode.top_p
        )
        each = [shared] * len(prompts) if isinstance(shared, SamplingParams) else list(shared)
        if len(each) != len(prompts):
            raise UserError(f"{len(each)} sampling parameters for {len(prompts)} prompts")
        self.sampling = [p if p.seed is not None else replace(p, seed=secrets.randbits(32)) for p in each]
        self.prompts = [owner.encode(prompt) for prompt in prompts]
        ends = [(() if p.ignore_eos else owner.config.eos_token_ids) + p.stop_token_ids for p in self.sampling]
        self.builders = [TextBuilder(owner.tokenizer, p.stop, end) for p, end in zip(self.sampling, ends, strict=True)]
        self.decoding = Decoding(owner.model, self.prompts, self.sampling, self.decode.policy())
        longest = max(p.max_tokens for p in self.sampling)
        self.rounds = ROUNDS_PER_LOOK if looks or any(p.stop for p in self.sampling) else longest
        self.emissions: list[Emission] = []

    def __iter__(self) -> Iterator[list[list[Piece]]]:
        finished = False
        while not finished:
            self.emissions = self.decoding.run(self.rounds)
            yield [self._feed(*pair) for pair in zip(self.builders, self.emissions, strict=True)]
            stopped = [builder.finish_reason is not None for builder in self.builders]
            self.decoding.end([i for i, stop in enumerate(stopped) if stop and not self.emissions[i].done])
            finished = all(stop or emission.done for stop, emission in zip(stopped, self.emissions, strict=True))
        yield [builder.finish() for builder in self.builders]

    def _feed(self, builder: TextBuilder, emission: Emission) -> list[Piece]:
        seen = len(builder.token_ids)
        if builder.finish_reason:
            return []
        return builder.feed(emission.tokens[seen:], drafted_flags(emission)[seen:])

    def generations(self) -> list[Generation]:
        return [
            Generation(
                text=builder.text,
                token_ids=builder.token_ids,
                finish_reason=builder.finish_reason or "length",
                prompt_tokens=len(prompt),
                sampling=sampling,
                stats=stats_from_history(emission.history, len(builder.token_ids), self.decode.stride),
                seconds=self.decoding.seconds,
                start_seconds=self.decoding.start_seconds,
            )
            for builder, prompt, sampling, emission in zip(
                self.builders, self.prompts, self.sampling, self.emissions, strict=True
            )
        ]


def drafted_flags(emission: Emission) -> list[bool]:
    """For every emitted token, whether it was an accepted draft."""
    flags = [flag for outcome in emission.history for flag in [True] * max(int(outcome), 0) + [False]]
    return flags[: len(emission.tokens)]


def _is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping | int))


def load(
    model: str | Path,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    mask_token: str | int | None = None,
) -> LanguageModel:
    """Load a model from a Hugging Face directory or Hub id, a GGUF file, or one of our checkpoints.

    ``adapter`` is a PEFT LoRA directory (or Hub id). ``dtype`` is "bfloat16" or "float32" (default: as stored, GGUF as
    bfloat16). ``mask_token`` (text or id) is for models that name none themselves. Raises UserError when anything is
    missing, damaged, or does not fit together.
    """
    source = open_source(model)
    config = source.config
    loaded = load_adapter(adapter, config) if adapter is not None else None
    if mask_token is not None:
        config = config.replace(mask_token_id=find_mask_token(source, str(mask_token)))
    elif loaded and loaded.config.mask_token_id is not None:
        config = config.replace(mask_token_id=loaded.config.mask_token_id)
    default = "bfloat16" if source.kind == "gguf" else "keep"
    tokenizer = source.tokenizer()
    params = fuse_projections(load_params(source, parse_dtype(dtype or default)))
    if loaded:
        loaded = loaded.astype(params["embed_tokens"]["embedding"].dtype)
    return LanguageModel(Qwen3(config, params, loaded), tokenizer, loaded is not None)

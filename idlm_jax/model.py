"""The Python API: ``load`` a model by path or Hub id, then ``generate`` or ``stream`` text from it."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jinja2 import TemplateError

from idlm_jax.backbone.adapter import Adapter
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.sharding import adapter_sharding, decoding_mesh, weight_sharding
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.checkpoint.peft import load_adapter
from idlm_jax.checkpoint.source import WeightSource, find_mask_token, parse_dtype
from idlm_jax.config import ModelConfig
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.decoding.forward import prepare
from idlm_jax.decoding.generate import DecodeStats, Decoding, Emission, SamplingParams, stats_from_history
from idlm_jax.decoding.text import Piece, TextBuilder
from idlm_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, str]
# A text to continue, a chat as OpenAI-style messages, or token ids.
Prompt = str | Sequence[Message] | Sequence[int]

# Rounds between two looks at the text, when somebody waits for it or a stop string may end it; and otherwise, so that
# an interrupt need not wait for the whole text.
ROUNDS_PER_LOOK = 8
ROUNDS_PER_CALL = 128


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
    decode: DecodeConfig
    stats: DecodeStats
    # Decoding of the whole batch, without prefill and compilation; and those.
    seconds: float
    start_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of this answer alone; the others of its batch were decoded in the same time."""
        return self.stats.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        stats = self.stats
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "sampling": asdict(self.sampling),
            "stride": self.decode.stride,
            "layout": self.decode.layout,
            "coupling": self.decode.coupling,
            "gated": self.decode.gated,
            "stats": {
                "tokens": stats.tokens,
                "forwards": stats.forwards,
                "tokens_per_forward": stats.tokens_per_forward,
                "acceptance": list(stats.acceptance),
                "cold_share": stats.cold_share,
                "seconds": self.seconds,
                "start_seconds": self.start_seconds,
                "tokens_per_second": self.tokens_per_second,
            },
        }


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

    @property
    def copies(self) -> int:
        """How many copies of the model split the requests of a batch."""
        return 1 if self.model.mesh is None else self.model.mesh.shape["data"]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; chats go through the tokenizer's chat template, ready for the answer."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt, verbose=False).input_ids)
        if len(prompt) and isinstance(prompt[0], Mapping):
            if not self.tokenizer.chat_template:
                raise UserError("this model has no chat template; give a plain text prompt")
            chat = [dict(message) for message in cast("Sequence[Message]", prompt)]
            try:
                text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            except TemplateError as error:
                raise UserError(f"the model's chat template refuses these messages: {error}") from None
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        return [int(token) for token in cast("Sequence[int]", prompt)]

    def as_chat(self, text: str, system: str | None = None) -> Prompt:
        """A text as the user's message of a chat, where the tokenizer has a chat template; else the text itself."""
        if not self.tokenizer.chat_template:
            if system is not None:
                raise UserError("this model has no chat template, so there is no place for a system message")
            return text
        opening = [] if system is None else [{"role": "system", "content": system}]
        return [*opening, {"role": "user", "content": text}]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        decode: DecodeConfig | None = None,
        **overrides: Any,
    ) -> list[Generation]:
        """Answer one prompt or a batch of prompts of any lengths; always returns a list.

        ``sampling`` is one for all or one each (default: what ``decode`` carries, greedy if nothing). ``decode`` and
        keyword arguments named like its fields (``stride``, ``layout``, ``coupling``, ``gated``) say how: the text
        follows the same distribution whatever they are, and with ``coupling="gumbel"`` it is the same text. Raises
        UserError for requests that cannot run.
        """
        batch = cast("list[Prompt]", [prompts] if _is_single(prompts) else list(prompts))
        answering = self.start(batch, sampling, decode, streaming=False, **overrides)
        for _ in answering:
            pass
        return answering.generations()

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        decode: DecodeConfig | None = None,
        **overrides: Any,
    ) -> Iterator[Piece | Generation]:
        """Answer one prompt piece by piece, as text is committed; the last item is the finished Generation."""
        answering = self.start([prompt], sampling, decode, **overrides)
        for pieces in answering:
            yield from pieces[0]
        yield answering.generations()[0]

    def start(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        decode: DecodeConfig | None = None,
        streaming: bool = True,
        **overrides: Any,
    ) -> "Answering":
        """Check a batch, compile and prefill; the answers come when the result is iterated.

        ``streaming`` looks for new text every few rounds rather than as seldom as the stop strings allow.
        """
        return Answering(self, prompts, sampling, decode, overrides, streaming)


class Answering:
    """A batch being answered: iterating it decodes, yielding the new pieces of every request."""

    def __init__(
        self,
        owner: LanguageModel,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        decode: DecodeConfig | None,
        overrides: Mapping[str, Any],
        streaming: bool,
    ):
        if not len(prompts):
            raise UserError("no prompts given")
        for name in overrides:
            if name not in DecodeConfig.__dataclass_fields__:
                raise TypeError(
                    f"unexpected keyword argument '{name}'{did_you_mean(name, DecodeConfig.__dataclass_fields__)}"
                )
        self.decode = replace(decode or DecodeConfig(), **overrides)
        if sampling is None:
            sampling = SamplingParams(self.decode.temperature, self.decode.top_k, self.decode.top_p)
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise UserError(f"{len(each)} sampling parameters for {len(prompts)} prompts")
        self.sampling = [p if p.seed is not None else replace(p, seed=secrets.randbits(32)) for p in each]
        self.prompts = [owner.encode(prompt) for prompt in prompts]
        ends = [(() if p.ignore_eos else owner.config.eos_token_ids) + p.stop_token_ids for p in self.sampling]
        self.builders = [TextBuilder(owner.tokenizer, p.stop, end) for p, end in zip(self.sampling, ends, strict=True)]
        self.decoding = Decoding(owner.model, self.prompts, self.sampling, self.decode.policy())
        looks = streaming or any(p.stop for p in self.sampling)
        self.rounds = ROUNDS_PER_LOOK if looks else ROUNDS_PER_CALL
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
        return builder.feed(emission.tokens[seen:].tolist(), drafted_flags(emission)[seen:])

    def generations(self) -> list[Generation]:
        """The answers so far; complete once the iteration has ended."""
        return [
            Generation(
                text=builder.text,
                token_ids=builder.token_ids,
                finish_reason=builder.finish_reason or "length",
                prompt_tokens=len(prompt),
                sampling=sampling,
                decode=self.decode,
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
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping | Integral))


def load(
    model: str | Path,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    mask_token: str | int | None = None,
    tp: int = 1,
    data_parallel: int = 1,
) -> LanguageModel:
    """Load a model from a Hugging Face directory or Hub id, a GGUF file, or one of our checkpoints.

    ``adapter`` is a PEFT LoRA: a directory, a Hub id, or "smollm2-n4", which comes with the package. ``dtype`` is
    "bfloat16" or "float32" (default: as stored, GGUF as bfloat16). ``mask_token`` (text or id) is for models that name
    none themselves. Weights and key heads are split over ``tp`` devices; ``data_parallel`` such copies of the model
    split the requests of a batch. Raises UserError when anything is missing, damaged, or does not fit together.
    """
    source = open_source(model)
    config = source.config
    mesh = decoding_mesh(config, tp, data_parallel)
    loaded = load_adapter(adapter, config) if adapter is not None else None
    if mask_token is not None:
        config = config.replace(mask_token_id=find_mask_token(source, str(mask_token)))
    elif loaded and loaded.config.mask_token_id is not None:
        config = config.replace(mask_token_id=loaded.config.mask_token_id)
    default = "bfloat16" if source.kind == "gguf" else "keep"
    tokenizer = source.tokenizer()
    if not tokenizer.is_fast:
        raise UserError(f"{model}: its tokenizer ({type(tokenizer).__name__}) has no fast form (tokenizer.json)")
    network = _assemble(source, config, parse_dtype(dtype or default), loaded, mesh)
    return LanguageModel(network, cast("PreTrainedTokenizerFast", tokenizer), loaded is not None)


def _assemble(
    source: WeightSource, config: ModelConfig, dtype: jnp.dtype | None, adapter: Adapter | None, mesh: Mesh | None
) -> Qwen3:
    """The network in the form in which it decodes fastest, on one device or laid out over a mesh."""
    params = load_params(source, dtype, None if mesh is None else weight_sharding(mesh))
    if adapter:
        adapter = adapter.astype(params["embed_tokens"]["embedding"].dtype)
    if mesh is None:
        return Qwen3(config, *prepare(config, params, adapter))
    if adapter:
        placed = jax.device_put(adapter.params, adapter_sharding(config, adapter, mesh))
        adapter = Adapter(adapter.config, placed)
    with jax.set_mesh(mesh):
        return Qwen3(config, *prepare(config, params, adapter))

"""A model class for lm-evaluation-harness: log-likelihoods by one causal pass, texts by strided decoding.

Importing this module registers it there as ``idlm``; lm_eval itself looks for no models outside its own package, so its
command line knows it when started as ``python -m idlm_jax.evaluation.lm_eval``.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import batched
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding.cache import bucket
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.errors import UserError
from idlm_jax.model import LanguageModel, load
from pallas_kernels.linear_cross_entropy.api import map_rows
from pallas_kernels.linear_cross_entropy.reference import cross_entropy
from pallas_kernels.range_attention.api import range_attention

# Texts (kept by lm_eval for its cache), context, continuation.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("idlm")
class IdlmModel(TemplateLM):
    """What ``lm_eval --model idlm`` runs."""

    def __init__(
        self,
        pretrained: str | LanguageModel,
        adapter: str | None = None,
        dtype: str | None = None,
        mask_token: str | int | None = None,
        stride: int | None = None,
        layout: str = "branch",
        coupling: str = "gumbel",
        gated: bool = True,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 16,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """``pretrained`` and what follows as in ``idlm_jax.load``; ``stride`` to ``gated`` as in DecodeConfig.

        The stride is 4 unless given, for a model without mask token 1 (AR). ``max_length`` is the model's context if
        not given; longer contexts lose their beginning. Requests that sample have the seeds ``seed``, ``seed`` + 1, …
        ``device`` and ``max_batch_size`` are lm_eval's and change nothing: JAX has chosen the device.
        """
        super().__init__()
        self.model = (
            pretrained if isinstance(pretrained, LanguageModel) else load(pretrained, adapter, dtype, mask_token)
        )
        self.name = pretrained if isinstance(pretrained, str) else "idlm"
        self.tokenizer: Any = self.model.tokenizer
        config = self.model.config
        if stride is None:
            stride = 1 if config.mask_token_id is None else 4
        self.decode = DecodeConfig(stride=stride, layout=layout, coupling=coupling, gated=gated)
        self.decode.policy()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size must be a positive number, not {batch_size}")
        self.batch_size, self.max_gen_toks, self.seed = int(batch_size), max_gen_toks, seed
        context = config.max_position_embeddings
        self.max_length = min(max_length or context, context)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.model.config.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of lm_eval's caches."""
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that begins with the token of beginnings, as chat templates write it, gets no second."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False).input_ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the model's template renders it."""
        if not self.tokenizer.chat_template:
            raise UserError("this model has no chat template; leave --apply_chat_template out")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, greedy unless a task samples, each before the first of its stop strings."""
        texts = [""] * len(requests)
        prompts, sampling = zip(*map(self._generation, range(len(requests)), requests), strict=True)
        for batch in self._batches([len(prompt) for prompt in prompts], "generating", disable_tqdm):
            answers = self.model.generate([prompts[i] for i in batch], [sampling[i] for i in batch], self.decode)
            for i, answer in zip(batch, answers, strict=True):
                texts[i] = answer.text
                self.cache_hook.add_partial("generate_until", requests[i].args, answer.text)
        return texts

    def _generation(self, number: int, request: Instance) -> tuple[list[int], SamplingParams]:
        context, arguments = request.args
        settings = cast("dict[str, Any]", normalize_gen_kwargs(arguments, self.max_gen_toks))
        sampling = SamplingParams(
            temperature=settings.get("temperature", 0.0),
            top_k=int(settings.get("top_k") or 0),
            top_p=float(settings.get("top_p") or 1.0),
            seed=self.seed + number,
            max_tokens=settings["max_gen_toks"],
            stop=tuple(stop for stop in settings["until"] if stop),
        )
        room = self.max_length - sampling.max_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks {sampling.max_tokens} leaves no room for a prompt in {self.max_length} tokens"
            )
        return (self.tok_encode(context) or [self.prefix_token_id])[-room:], sampling

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        windows: list[TokenRequest] = []
        owners = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
        ):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For every request, log p of the continuation and whether greedy decoding would write it."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(f"a continuation of {longest} tokens is longer than the context of {self.max_length}")
        texts = [[*context, *continuation][-self.max_length - 1 :] for _, context, continuation in requests]
        adapter_from = None if self.decode.gated else 0
        for batch in self._batches(list(map(len, texts)), "scoring", disable_tqdm):
            rows = 1 << (len(batch) - 1).bit_length()
            tokens = np.zeros((rows, bucket(max(len(texts[i]) for i in batch) - 1) + 1), np.int32)
            for row, i in zip(tokens, batch, strict=False):
                row[: len(texts[i])] = texts[i]
            log_p, greedy = jax.device_get(_score(self.model.model, jnp.asarray(tokens), adapter_from))
            for row, i in enumerate(batch):
                names, _, continuation = requests[i]
                part = slice(len(texts[i]) - 1 - len(continuation), len(texts[i]) - 1)
                results[i] = float(log_p[row, part].sum(dtype=np.float64)), bool(greedy[row, part].all())
                if names is not None:
                    self.cache_hook.add_partial("loglikelihood", names, results[i])
        return results

    def _batches(self, lengths: Sequence[int], what: str, quiet: bool) -> Iterator[tuple[int, ...]]:
        """Numbers of requests, the longest first."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        with tqdm(total=len(order), desc=what, disable=quiet) as bar:
            for batch in batched(order, self.batch_size):
                yield batch
                bar.update(len(batch))


@partial(jax.jit, static_argnames=("adapter_from",))
def _score(
    model: Qwen3, tokens: Int[Array, "B L+1"], adapter_from: int | None
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """log p of every token but the first given those before it, and whether it is the likeliest."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    index = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)

    def attend(q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        return range_attention(q, k, v, jnp.zeros_like(index), index + 1), state

    def compare(logits: Array, teacher: None, target: Array) -> tuple[Array, Array]:
        return -cross_entropy(logits, teacher, target), jnp.argmax(logits, axis=-1) == target

    hidden, _ = model(inputs, index, attend, None, adapter_from)
    return map_rows(compare, hidden, model.head(), targets)

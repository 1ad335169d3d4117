"""Flags that several verbs share, as dataclasses; a flag that was not given leaves the word to a decode file."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction, arg

from idlm_jax.cli.render import Notice
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from idlm_jax.decoding.config import DecodeConfig
    from idlm_jax.decoding.generate import SamplingParams
    from idlm_jax.model import LanguageModel

Model = Annotated[str, arg(metavar="MODEL")]


@dataclass(frozen=True)
class ModelFlags:
    """Which model, and in what precision."""

    # PEFT LoRA that teaches the model to draft: a directory, a Hub id, or "smollm2-n4", which comes with the package;
    # acts on mask rows only, so the text stays the base model's.
    adapter: Annotated[
        str | None, arg(metavar="ADAPTER", help_behavior_hint="(default: none; of the demo: smollm2-n4)")
    ] = None
    # Of weights and cache.
    dtype: Annotated[
        str | None,
        arg(metavar="{bfloat16,float32}", help_behavior_hint="(default: as stored; a GGUF file as bfloat16)"),
    ] = None
    # Text or id of the token whose rows draft, for a model that names none itself.
    mask_token: Annotated[
        str | None, arg(metavar="TOKEN", help_behavior_hint="(default: the model's or the adapter's)")
    ] = None

    # Devices that share the model, each with its part of the weights, key heads and vocabulary; must divide the key
    # heads.
    tp: Annotated[int, arg(metavar="DEVICES")] = 1

    def load(self, model: str) -> "LanguageModel":
        """Load the model, saying so on stderr if that takes long."""
        # A message after two seconds must not wait for JAX to be imported.
        with Notice(f"loading {model}"):
            from idlm_jax.model import load

            return load(model, self.adapter, self.dtype, self.mask_token, self.tp, self._copies)

    @property
    def _copies(self) -> int:
        return 1


@dataclass(frozen=True)
class BatchModelFlags(ModelFlags):
    """Which model, in what precision, and how many of it: of verbs that decode batches."""

    # Copies of the model, each on --tp devices of its own, that split the requests of a batch: 1, 2, 4 …
    data_parallel: Annotated[int, arg(metavar="COPIES")] = 1

    @property
    def _copies(self) -> int:
        return self.data_parallel


@dataclass(frozen=True)
class DecodeFlags:
    """How to decode; none of it changes the distribution of the text, except --ungated."""

    # Decode settings, for example configs/decode/isd_n4.yaml; the flags below win over the file.
    decode: Annotated[Path | None, arg(metavar="FILE.yaml", help_behavior_hint="(default: none)")] = None
    # N, the most tokens a forward pass can emit; 1 is ordinary (AR) decoding.
    stride: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 4)")] = None
    # branch: drafts after every possible rejection, N*N rows. standard: the paper's 2N - 1 rows.
    layout: Annotated[str | None, arg(metavar="{branch,standard}", help_behavior_hint="(default: branch)")] = None
    # gumbel: the very text of AR with the same seed. ratio: the paper's p/q rule, the same distribution.
    coupling: Annotated[str | None, arg(metavar="{gumbel,ratio}", help_behavior_hint="(default: gumbel)")] = None
    # Apply the adapter to every row: the text is then that of the adapted model, not of the base model.
    ungated: bool = False
    # xla: no kernels of our own, for comparison or where one misbehaves.
    kernels: Annotated[str | None, arg(metavar="{auto,xla}", help_behavior_hint="(default: auto)")] = None

    def config(self) -> "DecodeConfig":
        """The decode file, or the defaults, with the flags that were given on top; raises UserError."""
        from idlm_jax.decoding.config import DecodeConfig, load_decode_config

        config = DecodeConfig() if self.decode is None else load_decode_config(self.decode)
        given = _given(stride=self.stride, layout=self.layout, coupling=self.coupling, kernels=self.kernels)
        config = replace(config, **given)
        if self.ungated:
            config = replace(config, gated=False)
        config.policy()
        return config


@dataclass(frozen=True)
class SamplingFlags:
    """Which text to ask for."""

    # 0 is greedy.
    temperature: Annotated[
        float | None, arg(metavar="T", help_behavior_hint="(default: the decode file's, else 0)")
    ] = None
    # Sample from the K most likely tokens; 0 is off.
    top_k: Annotated[int | None, arg(metavar="K", help_behavior_hint="(default: the decode file's, else 0)")] = None
    # Sample from the most likely tokens that hold this probability.
    top_p: Annotated[float | None, arg(metavar="P", help_behavior_hint="(default: the decode file's, else 1)")] = None
    # The text is a function of prompt, seed and sampling parameters.
    seed: Annotated[int | None, arg(metavar="SEED", help_behavior_hint="(default: drawn, and reported)")] = None
    # Most tokens of an answer.
    max_tokens: Annotated[int, arg(metavar="COUNT")] = 256
    # End the text before this string.
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    # Go on past the model's end token.
    ignore_eos: bool = False

    def params(self, decode: "DecodeConfig") -> "SamplingParams":
        """Sampling parameters, what the flags leave open from the decode settings; raises UserError."""
        from idlm_jax.decoding.generate import SamplingParams

        params = SamplingParams(
            decode.temperature,
            decode.top_k,
            decode.top_p,
            self.seed,
            self.max_tokens,
            self.stop,
            ignore_eos=self.ignore_eos,
        )
        params = replace(params, **_given(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p))
        params.validate()
        return params


def check_can_draft(name: str, model: "LanguageModel", decode: "DecodeConfig") -> None:
    """Raise UserError that names the flags to use when a model has no mask token to draft with."""
    if decode.stride == 1 or model.config.mask_token_id is not None:
        return
    from idlm_jax.checkpoint.fetch import MODELS

    known = next((known for known in MODELS.values() if known.file_name == Path(name).name), None)
    token = (
        f"--mask-token {known.mask_token_id}" if known else "--mask-token TEXT_OR_ID (a token that no text contains)"
    )
    raise UserError(
        f"{name} names no mask token, which strided decoding drafts with: give {token}, or --stride 1 for AR"
    )


def check_adapter(model: "LanguageModel", flags: DecodeFlags) -> None:
    """Raise UserError for --ungated without an adapter."""
    if flags.ungated and not model.has_adapter:
        raise UserError("--ungated says where an adapter acts; give one with --adapter")


def _given(**flags: Any) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}

"""``idlm plan decode``: what a round of decoding would take on devices that are not there."""

from typing import Annotated

from tyro.conf import Positional, arg

from idlm_jax.cli.plans import Targets, make_plans, without_accelerators
from idlm_jax.cli.render import Notice
from idlm_jax.errors import UserError


def plan_decode(
    model: Positional[Annotated[str, arg(metavar="MODEL")]],
    *,
    target: Targets,
    batch: Annotated[int, arg(metavar="REQUESTS")] = 64,
    context: Annotated[int, arg(metavar="TOKENS")] = 4096,
    tp: Annotated[int | None, arg(metavar="CHIPS", help_behavior_hint="(default: the fewest that fit)")] = None,
    stride: Annotated[int, arg(metavar="N")] = 4,
    layout: Annotated[str, arg(metavar="{branch,standard}")] = "branch",
    adapter_rank: Annotated[int, arg(metavar="R")] = 0,
    json: bool = False,
) -> None:
    """Compile a round of decoding for GPUs or TPUs that are not there, and tell what it takes.

    It is the loop of rounds that decodes a batch, with the kernels of that platform, over a cache of as many tokens as
    asked for, in bfloat16; a loop whose rounds nobody knows counts as one round. Weights, key heads and vocabulary are
    split over --tp chips, requests over the others. Neither weights nor accelerators are needed, but the compiler, from
    the extra "tpu" or "gpu". The time is an estimate from below: FLOPs, bytes of memory and bytes of links, each at the
    full rate of the chip's data sheet; tokens are the most that a round can emit.

    Targets are h100xN and h200xN (GPUs of one host), v5e-N, v5p-N and v6e-N (chips of a TPU slice).

    Examples:
      idlm plan decode configs/models/qwen3-8b.yaml --target h100x1 v5e-16 v6e-8 --batch 64 --context 4096
      idlm plan decode configs/models/qwen3-32b.yaml --target h100x8 --batch 64 --tp 4 --stride 4 --layout branch
      idlm plan decode configs/models/qwen3-8b.yaml --target v5e-16 --stride 1 --json

    Args:
        model: A YAML file of configs/models, or any checkpoint, whose weights are not read.
        target: Kind and number of chips; several are compiled for one after the other.
        batch: Requests at once, on all devices.
        context: Tokens of each in the cache.
        tp: Chips that share one copy of the model.
        stride: Most tokens of a request that a round can emit; 1 is ordinary (AR) decoding.
        layout: branch drafts after every possible rejection, standard as the paper does.
        adapter_rank: Rank of a gated adapter that drafts; 0 is none.
        json: Print one JSON object a target.
    """
    with Notice("starting JAX"):
        without_accelerators()
        from idlm_jax.checkpoint.summary import summarize
        from idlm_jax.decoding.config import DecodeConfig
        from idlm_jax.planning.decoding import Workload, plan_decoding

        if batch < 1 or context < 1 or adapter_rank < 0:
            raise UserError("--batch and --context must be at least 1, --adapter-rank at least 0")
        policy = DecodeConfig(stride=stride, layout=layout).policy()
        work, config = Workload(policy, batch, context, adapter_rank), summarize(model).config
    make_plans(target, lambda one: plan_decoding(config, work, one, tp), json)

"""The report that people read: Markdown and one picture, both from the numbers alone."""

import io
import textwrap
from pathlib import Path
from typing import Any

from idlm_jax.checkpoint.atomic import write_file
from scripts.equivalence.picture import draw_picture

WRONG = "official rule"


def render(results: dict[str, Any], output: Path) -> None:
    """Write OUTPUT.md and OUTPUT.png."""
    parts = [_opening(results, output.name), _verdicts(results)]
    for name, section in (("logits", _logits), ("draws", _draws), ("texts", _texts), ("greedy", _greedy)):
        if results.get(name):
            parts.append(section(results))
    parts.append(_how(results))
    write_file(output.with_suffix(".md"), "\n\n".join(map(_wrapped, "\n\n".join(parts).split("\n\n"))) + "\n")
    image = io.BytesIO()
    draw_picture(results).savefig(image, format="png", dpi=130)
    write_file(output.with_suffix(".png"), image.getvalue())


def _opening(results: dict[str, Any], name: str) -> str:
    commands = "\n".join(run["command"] for run in results["runs"])
    versions, seconds = results["runs"][-1]["versions"], sum(run["all_seconds"] for run in results["runs"])
    return f"""# Equivalence with PyTorch

Does strided decoding in idlm_jax write what the same model writes, token by token, in PyTorch? Three answers, each
from two processes that share token ids and weight files and no code: the arithmetic is the same (logits), sampled
texts follow the same distribution (two-sample tests), greedy texts are equal, or differ at a tie. The model is
SmolLM2-135M-Instruct with the gated adapter that comes with the package, N = {results["plan"]["stride"]}; the reference
in plain PyTorch is [tests/reference](../tests/reference). As a check of the checks, the acceptance rule of the official
code, which is not exact, goes through the same tests at the same number of texts.

```
{commands}
```

{versions["device"]}; jax {versions["jax"]}, torch {versions["torch"]}, transformers {versions["transformers"]};
{seconds:.0f} seconds in all. `python -m scripts.equivalence_h100 --render docs/{name}.json` writes
this page again from its numbers.

![errors, p-values and distances]({name}.png)"""


def _verdicts(results: dict[str, Any]) -> str:
    """The summary: a row a claim."""
    rows = [_logits_verdict(results["logits"])] if results.get("logits") else []
    for part, claim in (("draws", "the next tokens at a prefix"), ("texts", "long texts")):
        if results.get(part):
            rows.append(_sampled_verdict(results[part]["writers"], f"{claim} follow PyTorch's distribution", results))
    if results.get("draws"):
        rows.append(_sampled_verdict(results["draws"]["accepted"], "drafts are accepted as by PyTorch's ISD", results))
    if results.get("greedy"):
        rows.append(_greedy_verdict(results["greedy"]["float32"]))
    return _table(["claim", "found", "holds", f"the {WRONG}"], rows)


def _logits_verdict(logits: dict[str, Any]) -> list[str]:
    rows = [row["float32"] for model in logits.values() for row in model["float32"]["rows"].values()]
    largest, agreement = max(row["largest"] for row in rows), min(row["argmax_agreement"] for row in rows)
    found = f"float32: no logit is off by more than {largest:.1e} of their spread, best tokens agree at {agreement:.3%}"
    return ["our logits are PyTorch's", found, _yes(largest < 1e-3), "–"]


def _sampled_verdict(writers: dict[str, Any], claim: str, results: dict[str, Any]) -> list[str]:
    ours = [row for name, row in writers.items() if name != WRONG and not name.startswith("PyTorch")]
    wrong = writers[WRONG]
    # Each row is corrected for its own tests already.
    smallest = min(1.0, len(ours) * min(row["smallest_p"] for row in ours))
    found = f"smallest p of {sum(row['tests'] for row in ours):,} tests, corrected for their number: {_p(smallest)}"
    detected = f"{wrong['rejected']:,} of {wrong['tests']:,} reject, smallest {_p(wrong['smallest_p'])}"
    return [claim, found, _yes(smallest >= results["alpha"]), detected]


def _greedy_verdict(greedy: dict[str, Any]) -> list[str]:
    ways = greedy["ways"].values()
    same, gap = min(way["same_as_pytorch"] for way in ways), max(_gap(way) for way in ways)
    if same == greedy["texts"]:
        found = f"float32: {same} of {same} are, by every decoder"
    else:
        found = f"float32: at least {same} of {greedy['texts']} are; largest logit gap where one differs {gap:.1e}"
    return ["greedy texts are PyTorch's", found, _yes(gap < 1e-2), "–"]


def _logits(results: dict[str, Any]) -> str:
    rows = []
    for name, model in results["logits"].items():
        for dtype in ("float32", "bfloat16"):
            for kind, errors in model[dtype]["rows"].items():
                shown = "SmolLM2" if name == "real" else f"{name}, random"
                rows.append(
                    [shown, dtype, kind, *(_error(errors.get(key)) for key in ("float32", dtype, "PyTorch itself"))]
                )
    header = [
        "model",
        "ours in",
        "rows",
        "against PyTorch float32",
        "against PyTorch in the same",
        "PyTorch bfloat16 against its float32",
    ]
    plan = results["plan"]
    return f"""## Logits

{plan["logit_rows"]} sequences of {plan["logit_tokens"]} tokens. *Clean pass* is the plain forward pass; the rows of
*decoding windows* are those that verify and draft while ISD decodes (branch layout, the text fed as drafts), against
PyTorch's causal pass and against its masks with the adapter applied by hand. Largest / mean error in units of the
spread (standard deviation) of all logits, and how often the best token is the same. In bfloat16 ours should be as far
from float32 as PyTorch's own; errors by position and by layer are in the picture.

{_table(header, rows)}"""


def _error(errors: dict[str, float] | None) -> str:
    if errors is None:
        return "–"
    return f"{errors['largest']:.1e} / {errors['mean']:.1e}, {errors['argmax_agreement']:.2%}"


def _draws(results: dict[str, Any]) -> str:
    draws = results["draws"]
    tokens = draws["tokens"]
    rows = []
    for name, row in draws["writers"].items():
        view = row["views"]["text"]
        variation = view["total_variation"]
        excess = [f"{row['views'][f'token {k + 1}']['total_variation']['excess']:+.1f}" for k in range(tokens)]
        distance = f"{variation['value']:.4f} ({variation['null_mean']:.4f})"
        count = f"{row['texts'] * draws['prefixes'] * tokens:,}"
        rows.append([name, count, *excess, distance, f"{row['rejected']} / {row['tests']}", _p(row["smallest_p"])])
    depths = [f"token {k + 1}" for k in range(tokens)]
    header = ["writer", "next-token draws", *depths, "TV of texts (null)", "rejected", "smallest corrected p"]
    accepted = [
        [name, f"{row['mean']:.3f}", _p(row["smallest_p"]) if "smallest_p" in row else "–"]
        for name, row in draws["accepted"].items()
    ]
    same = ", ".join(f"{share:.3%} ({name})" for name, share in draws["same_as_our_ar"].items())
    count = draws["prefixes"] * draws["reference_texts"]
    return f"""## Draws of the next tokens

{draws["prefixes"]} prefixes (the prompts of scripts/prompts.txt as chats, and each with the beginning of its answer),
half sampled plainly at T = 1, half at T = 0.8 with top-k 50 and top-p 0.95. After each prefix every writer draws
texts of {tokens} tokens; PyTorch's AR draws {count:,} of them as the reference.

Why this can fail: the first token of a text comes from a cold round and has seen no draft. The others come from
drafts, accepted or corrected, of the rounds after; a rule that treats drafts wrongly changes the tokens from the
second on, at every prefix in the same direction, and texts as a whole if it only breaks their dependence. For each
prefix, and for the token at each depth and the whole text, both samples are counted in at most 64 cells, and
chi-square and total variation are held against the permutation null (labels exchanged within the prefix). The table
gives the total variation summed over prefixes, in standard deviations above its null, by depth; then Holm's
correction over all tests of a writer (prefixes, views, both statistics). *PyTorch AR again* is the reference with
other seeds: what no difference looks like.

{_table(header, rows)}

Drafts accepted in the first round that verifies, against ISD written in PyTorch from the same specification (the
layouts then have the same drafts; `gumbel` couples draft and token in another way, so it is not compared here):

{_table(["decoder", "mean of " + str(results["plan"]["stride"] - 1), "smallest corrected p"], accepted)}

With the `gumbel` coupling a text is a function of its seed: the same short text as our own AR's with that seed in
{same}."""


def _texts(results: dict[str, Any]) -> str:
    texts = results["texts"]
    rows = []
    for name, row in texts["writers"].items():
        excess = [f"{test['excess']:+.1f}" for test in row["distances"].values()]
        means = [f"{row['means']['tokens']:.1f}", f"{row['means']['surprisal']:.3f}"]
        rows.append([name, *means, *excess, f"{row['rejected']} / {row['tests']}", _p(row["smallest_p"])])
    tests = list(next(iter(texts["writers"].values()))["distances"])
    header = ["writer", "mean tokens", "mean surprisal", *tests, "rejected", "smallest corrected p"]
    return f"""## Long texts

{texts["texts"]:,} continuations of up to {texts["tokens"]} tokens from every writer, after the same
{texts["prefixes"]} prefixes, against as many by PyTorch's AR. `mmd` is the maximum mean discrepancy of n-gram
profiles (n = 1, 2, 3; Gaussian kernel); the others compare lengths, the share of texts that ended, surprisal under
the base model (nats a token), the entropy of all tokens, and the n-grams used. Every column is a distance in standard
deviations above its permutation null.

{_table(header, rows)}"""


def _greedy(results: dict[str, Any]) -> str:
    rows, differences = [], []
    for dtype, greedy in results["greedy"].items():
        for name, way in greedy["ways"].items():
            shown = "AR" if name == "AR" else f"ISD, {name}"
            same, own = (f"{way[key]} / {greedy['texts']}" for key in ("same_as_pytorch", "same_as_our_ar"))
            gap = f"{_gap(way):.5f}" if way["differences"] else "–"
            rows.append([dtype, shown, same, gap, own, f"{way['tokens_per_forward']:.2f}"])
            places = [f"{d['prompt']}:{d['token']} ({d['gap']:.3g})" for d in way["differences"]]
            if places:
                differences.append(f"- {dtype}, {shown}: {', '.join(places)}")
    tokens = next(iter(results["greedy"].values()))["tokens"]
    header = [
        "dtype",
        "ours",
        "PyTorch's text",
        "largest gap at a first difference",
        "our AR's text",
        "tokens a forward",
    ]
    listed = "\n".join(differences) or "There is none."
    return f"""## Greedy texts

{tokens} tokens after each prompt, nothing ending a text early. Where a text first differs from PyTorch's, the gap is
between PyTorch's two best logits there, in its own dtype: a gap of no more than rounding error is a tie that another
order of summation may decide either way.

{_table(header, rows)}

Every first difference, as prompt:token (gap):

{listed}"""


def _how(results: dict[str, Any]) -> str:
    sides = [side for run in results["runs"] for side in run["seconds"].items()]
    rows = [[side, part, f"{value:.0f}"] for side, parts in sides for part, value in parts.items()]
    return f"""## How to read the tests

A statistic is compared with its values when who wrote a text is exchanged at random among texts of the same prefix,
and its p-value is the tail of the gamma distribution with that mean and variance (exact for a chi-square, and small
p-values need no million of permutations; tests/evaluation/test_two_samples.py checks that p-values of equal samples
are uniform). A writer fails if any test has p < {results["alpha"]} after Holm's correction, so equal distributions
fail once in {1 / results["alpha"]:.0f} writers. Not rejecting is no proof of equality; the row of the {WRONG} says
how large a difference these numbers of texts show.

In `make test` the same tests run on a tiny model against texts that PyTorch sampled
(tests/evaluation/test_equivalence.py).

{_table(["side", "part", "seconds"], rows)}"""


def _wrapped(paragraph: str) -> str:
    """Prose in lines of 120; headings, tables, lists and code as they are."""
    return paragraph if paragraph.startswith(("#", "|", "-", "`", "!")) else textwrap.fill(paragraph, 120)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gap(way: dict[str, Any]) -> float:
    return max((difference["gap"] for difference in way["differences"]), default=0.0)


def _p(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "**no**"

"""Every way to decode against the enumerated AR distribution of a tiny model, as a Markdown table.

Run by hand (half an hour on two cores)::

    python -m scripts.distribution_table

Prints one row for each stride, layout, coupling, temperature, top-k and top-p, with and without an adapter: total
variation of 200,000 sampled texts to the exact distribution, what sampling noise alone gives, and the chi-square
p-value.
"""

import time

from tests.decoding.support import ALL_CELLS, enumerate_texts, fit, sample_texts, tiny_model

SAMPLES = 200_000


def main() -> None:
    """Print the table, then a line that sums it up."""
    models = {adapter: tiny_model(adapter=adapter) for adapter in (False, True)}
    print("| cell | samples | TV | noise mean | noise std | excess (std) | chi-square p |")
    print("|---|---|---|---|---|---|---|")
    began, fits = time.perf_counter(), []
    for cell in ALL_CELLS:
        model = models[cell.adapter]
        result = fit(sample_texts(model, cell, SAMPLES), enumerate_texts(model, cell))
        fits.append(result)
        numbers = f"{result.total_variation:.5f} | {result.noise_mean:.5f} | {result.noise_std:.5f}"
        print(
            f"| {cell.name} | {result.samples} | {numbers} | {result.excess:+.2f} | {result.chi_square_p:.3f} |",
            flush=True,
        )
    good = sum(result.good for result in fits)
    worst = max(result.excess for result in fits)
    smallest = min(result.chi_square_p for result in fits)
    print(
        f"\n{good} of {len(fits)} cells fit; largest excess {worst:+.2f} standard errors, smallest chi-square p "
        f"{smallest:.4f}; {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()

"""Every way to decode against the enumerated AR distribution of a tiny model, as a Markdown table.

Run by hand; it takes long on a CPU::

    python -m scripts.distribution_table

Prints one row for each stride, layout, coupling, temperature, top-k and top-p, with and without an adapter: total
variation of 200,000 sampled texts to the exact distribution, what sampling noise alone gives, and the chi-square
p-value.
"""

import time

from tests.decoding.support import ALL_CELLS, fit_and_confirm, tiny_model

SAMPLES = 200_000


def main() -> None:
    """Print the table, then a line that sums it up; a bad fit is followed by its confirmation on fresh seeds."""
    models = {adapter: tiny_model(adapter=adapter) for adapter in (False, True)}
    print("| cell | samples | TV | noise mean | noise std | excess (std) | chi-square p |")
    print("|---|---|---|---|---|---|---|")
    began, last = time.perf_counter(), []
    for cell in ALL_CELLS:
        fits = fit_and_confirm(models[cell.adapter], cell, SAMPLES)
        last.append(fits[-1])
        for result in fits:
            numbers = f"{result.total_variation:.5f} | {result.noise_mean:.5f} | {result.noise_std:.5f}"
            test = f"{result.excess:+.2f} | {result.chi_square_p:.5f}"
            print(f"| {cell.name} | {result.samples} | {numbers} | {test} |", flush=True)
    good = sum(result.good for result in last)
    print(f"\n{good} of {len(last)} cells fit; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()

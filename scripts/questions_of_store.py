"""Write the questions of a token store that `idlm data synthesize` made as prompts, to sample other answers to them.

    python scripts/questions_of_store.py data/smollm2-self --model models/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --count 40000 > data/questions.jsonl
    idlm data synthesize models/SmolLM2-135M-Instruct.Q4_1.gguf --prompts data/questions.jsonl --temperature 0 ...

Runs on a CPU in a minute. Questions that the model did not end, or that appear twice, are left out.
"""

import argparse
import json
import sys

from idlm_jax.checkpoint.open import open_source
from idlm_jax.data.synthesize import ChatFrame
from idlm_jax.data.tokens import TokenStore, check_tokenizer


def main() -> None:
    """Print one chat a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--model", required=True, help="the model whose tokenizer the store was made with")
    parser.add_argument("--count", type=int, help="at most so many (default: all)")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many, to hold them out")
    arguments = parser.parse_args()
    tokenizer = open_source(arguments.model).tokenizer()
    store = TokenStore.open(arguments.store)
    check_tokenizer(store.metadata, tokenizer, arguments.store)
    frame, seen = ChatFrame.of(tokenizer), set()
    for number in range(len(store)):
        tokens = store[number].tokens.tolist()[len(frame.prefix) :]
        if frame.end not in tokens:
            continue
        question = str(tokenizer.decode(tokens[: tokens.index(frame.end)])).strip()
        if not question or question in seen:
            continue
        seen.add(question)
        if len(seen) <= arguments.skip:
            continue
        print(json.dumps({"messages": [{"role": "user", "content": question}]}, ensure_ascii=False))
        if arguments.count is not None and len(seen) - arguments.skip >= arguments.count:
            break
    print(f"{len(seen) - arguments.skip} questions", file=sys.stderr)


if __name__ == "__main__":
    main()

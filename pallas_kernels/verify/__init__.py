"""From logits to tokens: filters, noise, accepted drafts, the next token and new drafts."""

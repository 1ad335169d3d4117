"""Training data: chats and text as a store of tokens, and Grain batches out of it."""

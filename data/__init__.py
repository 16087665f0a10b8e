"""Text in, tokens out: tokenizers, readers of text formats, and the commands that prepare a dataset."""

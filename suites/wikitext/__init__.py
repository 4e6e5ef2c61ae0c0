"""WikiText-103 and other text: language models compared by perplexity, in a window, with carried state and by position."""

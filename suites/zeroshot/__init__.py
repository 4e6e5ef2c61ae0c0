"""Zero-shot tasks of lm-evaluation-harness: the six of the HGRN2 table, LAMBADA, recall on real text, and any other by its name."""

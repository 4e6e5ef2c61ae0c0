"""MQAR: multi-query associative recall (Zoology, arXiv 2312.04927), as run for HGRN2 and its baselines."""

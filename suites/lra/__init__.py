"""Long Range Arena: ListOps, text, retrieval, images, Pathfinder and Path-X, each classified after one pass over up to 16,384 tokens."""

"""The recurrences that mixers run: one input record each, three implementations each (reference, chunked, fla)."""

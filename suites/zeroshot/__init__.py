"""Zero-shot evaluation by lm-evaluation-harness: PIQA, HellaSwag, WinoGrande, ARC, OpenBookQA, LAMBADA and any other of its tasks."""

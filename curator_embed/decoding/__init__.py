"""From encoded bytes to a model's input: decode, plan, resample, normalise, and prove it against the reference."""

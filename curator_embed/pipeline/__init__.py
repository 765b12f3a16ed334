"""Reading, decoding and the model on one worker, overlapped."""

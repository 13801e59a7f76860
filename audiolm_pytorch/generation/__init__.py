"""Generation: requests, prompts, sampling, decoding in sliding windows, and the pipeline of the stages."""

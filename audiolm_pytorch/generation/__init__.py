"""Generation: sampling, decode session, sliding windows, prompts, and the pipeline of the stages."""

"""Generation: sampling, the decode session, sliding windows, prompts, and the pipeline of the three stages."""

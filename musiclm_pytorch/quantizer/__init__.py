"""Conditioning codes for language models, which are MuLaN embeddings quantized by residual k-means."""

"""Conditioning codes: MuLaN embeddings, quantized by residual k-means."""

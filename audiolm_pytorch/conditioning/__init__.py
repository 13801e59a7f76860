"""Conditions of language models: condition tensors, text encoders and text tokenizers."""

"""Saving and loading of modules, JSON and safetensors files, models from the Hugging Face hub, and pickles."""

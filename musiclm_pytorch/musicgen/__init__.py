"""MusicGen and AudioGen: codec tokens from texts and melodies with one language model."""

"""Network parts shared by all models: layers, attention, the transformer, k-means."""

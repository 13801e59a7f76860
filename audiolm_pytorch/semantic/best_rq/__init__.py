"""BEST-RQ: a self-supervised encoder that is trained on audio only (arXiv:2202.01855), and its trainer."""

"""Packaging of musiclm-pytorch: two packages, one console script."""

from pathlib import Path

from setuptools import find_packages, setup

extras = {
    "pretrained": ["transformers>=4.48"],
    "torchaudio": ["torchaudio>=2.5"],
    "track": ["tensorboard>=2.15"],
    "web": ["gradio>=5.0"],
    "data": ["webdataset>=0.2", "datasets>=3.0"],
    "plot": ["matplotlib>=3.8"],
    "test": ["pytest>=8.0", "matplotlib>=3.8", "transformers>=4.48"],
}
extras["all"] = sorted({requirement for name in extras if name != "torchaudio" for requirement in extras[name]})

setup(
    name="musiclm-pytorch",
    version="0.1.0",
    description="MusicLM and AudioLM in PyTorch: small composable modules that turn a sentence into music",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["audiolm_pytorch*", "musiclm_pytorch*"]),
    package_data={
        "audiolm_pytorch": ["py.typed", "codecs/training/*.json", "codecs/training/*.png"],
        "musiclm_pytorch": ["py.typed", "bundled/**/*.json", "bundled/**/*.safetensors", "bundled/**/*.md"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.5",
        "einops>=0.8",
        "beartype>=0.19",
        "accelerate>=1.0",
        "vector-quantize-pytorch>=1.20",
        "scikit-learn>=1.4",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "soundfile>=0.12",
        "soxr>=0.5",
        "numpy>=1.26",
        "threadpoolctl>=3.1",
        "tqdm>=4.66",
        "tyro>=0.9",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["musiclm = musiclm_pytorch.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Sound Synthesis",
    ],
)

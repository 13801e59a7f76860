"""Small tokenizers and text encoders with random weights, in the files in which transformers' own are published."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

CAPTIONS = ["slow piano ballad", "Fast violin jig with drums", "a harp, played slowly in an empty hall"] * 4

KINDS = ("t5", "bert", "roberta")
ORACLES = {"t5": "T5EncoderModel", "bert": "BertModel", "roberta": "RobertaModel"}
TEXTS = ["Slow  piano", "a fast jig, with drums & a harp\nin an empty hall", "naïve Ünïcode 日本 🎻", "drums"]
# one spelling of them: white space is collapsed before any tokenizer sees it
CLEAN = [" ".join(text.split()) for text in TEXTS]
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=300)
T5_SIZES = dict(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
FAMILIES = {
    "AlbertModel": SIZES | {"embedding_size": 8},
    "BertModel": SIZES,
    "CamembertModel": SIZES,
    "DebertaV2Model": SIZES | {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]},
    "DistilBertModel": dict(vocab_size=300, dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "ElectraModel": SIZES | {"embedding_size": 8},
    "ModernBertModel": SIZES | {"pad_token_id": 0, "local_attention": 4},
    "MPNetModel": SIZES,
    "MT5EncoderModel": T5_SIZES,
    "RobertaModel": SIZES,
    "T5EncoderModel": T5_SIZES,
    "UMT5EncoderModel": T5_SIZES,
    "XLMRobertaModel": SIZES,
}
QUICK_FAMILIES = ("BertModel", "DebertaV2Model", "RobertaModel", "T5EncoderModel")


def write_roberta_tokenizer(folder: Path) -> int:
    """Byte-level BPE as vocab.json and merges.txt, as beside CLAP and RoBERTa; returns how many tokens there are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer=trainer)
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    _write_settings(folder, tokenizer_class="RobertaTokenizer", model_max_length=512)
    return tokenizer.get_vocab_size()


def write_bert_tokenizer(folder: Path) -> int:
    """WordPiece over lower case as vocab.txt, as beside BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer=trainer)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    (folder / "vocab.txt").write_text("\n".join([*vocabulary, ""]), encoding="utf-8")
    _write_settings(folder, tokenizer_class="BertTokenizer", do_lower_case=True, model_max_length=512)
    return len(vocabulary)


def write_t5_tokenizer(folder: Path) -> int:
    """Unigrams as tokenizer.json, as beside T5; padding and truncation are on in it, as in many published files."""
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=70, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=30, pad_token="<pad>")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_settings(folder, tokenizer_class="T5Tokenizer", eos_token="</s>", extra_ids=0, pad_token="<pad>")
    return tokenizer.get_vocab_size()


def _write_settings(folder: Path, **settings: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def randomised(model: nn.Module) -> nn.Module:
    """Norms and biases too: a weight in the wrong place shows. In eval mode."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim < 2 and "logit_scale" not in name:
                tensor.add_(0.2 * torch.randn(tensor.shape))
            elif "embed" in name:
                tensor.add_(0.5 * torch.randn(tensor.shape))
    return model.eval()


def write_text_encoder(folder: Path, kind: str, seed: int = 0) -> Path:
    """A folder as `t5`, `bert` or `roberta` are published: with decoder or language head, the latter without pooler."""
    folder.mkdir(parents=True)
    writers = {"t5": write_t5_tokenizer, "bert": write_bert_tokenizer, "roberta": write_roberta_tokenizer}
    num_tokens = writers[kind](folder)
    sizes = dict(
        vocab_size=num_tokens, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(seed)
    if kind == "t5":
        config = transformers.T5Config(vocab_size=num_tokens, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        model: nn.Module = transformers.T5ForConditionalGeneration(config)
    elif kind == "bert":
        config = transformers.BertConfig(max_position_embeddings=40, **sizes)
        model = transformers.BertForMaskedLM(config)
    else:
        config = transformers.RobertaConfig(max_position_embeddings=42, type_vocab_size=1, **sizes)
        model = transformers.RobertaForMaskedLM(config)
    randomised(model).save_pretrained(folder)
    return folder

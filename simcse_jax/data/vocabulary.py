"""A new BERT without weights: a WordPiece vocabulary learnt from text, and the sizes of an encoder."""

from collections.abc import Iterator
from pathlib import Path

from simcse_jax.config import MIN_LENGTH, DataConfig
from simcse_jax.data.columns import text_columns
from simcse_jax.data.corpus import open_source
from simcse_jax.data.rows import read_examples
from simcse_jax.errors import InputError
from simcse_jax.model import read_encoder_config
from simcse_jax.storage.files import check_new_folder, new_folder, write_json

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def learn_words(text: str, size: int, lowercase: bool = True) -> list[str]:
    """The tokens of a WordPiece vocabulary (Wu et al., arXiv 1609.08144) in the order of their ids.

    Args:
      text: training text, anything that `data.train` can name; of a table, all columns that look like text.
      size: most tokens; there are fewer if the text does not yield that many.
      lowercase: lower-case the text and strip its accents, as for bert-base-uncased.

    Raises:
      InputError: text that cannot be read, or not enough room for its characters.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    source = open_source(DataConfig(train=text))
    columns = text_columns(source)

    def sentences() -> Iterator[str]:
        for _, _, example in read_examples(source, columns, {}):
            yield from example

    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        # Characters may take half of the room; rarer ones are unknown. Text of many scripts has thousands.
        limit_alphabet=max(1, (size - len(SPECIAL)) // 4),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    ids = tokenizer.get_vocab()
    if len(ids) <= len(SPECIAL):
        raise InputError(f"{text} has no word to learn a vocabulary from: give other text")
    return sorted(ids, key=lambda word: ids[word])


def make_model_folder(
    text: str,
    output: str | Path,
    *,
    size: int = 8000,
    layers: int = 4,
    hidden: int = 256,
    heads: int = 4,
    intermediate: int = 0,
    positions: int = 512,
    lowercase: bool = True,
) -> Path:
    """Writes a BERT's config.json and a tokenizer learnt from text; `model.random_init` draws the weights.

    Args:
      text, size, lowercase: see `learn_words`.
      output: a folder that does not exist yet or is empty.
      layers, hidden, heads, positions: sizes of the encoder.
      intermediate: width of the feed-forward layers; four times `hidden` where 0.

    Raises:
      InputError: sizes that do not make an encoder, unreadable text, or a folder that exists or cannot be written.
    """
    folder = check_new_folder(output)
    least = {"size": len(SPECIAL) + 1, "layers": 1, "hidden": 1, "heads": 1, "intermediate": 0, "positions": MIN_LENGTH}
    given = (size, layers, hidden, heads, intermediate, positions)
    for (name, smallest), value in zip(least.items(), given, strict=True):
        if value < smallest:
            raise InputError(f"{name} is {value}; it must be at least {smallest}")
    if hidden % heads:
        raise InputError(f"hidden is {hidden}, which heads, {heads}, does not divide: give a multiple of it")
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate or 4 * hidden,
        "max_position_embeddings": positions,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    read_encoder_config(config)  # refuses sizes that do not go together
    words = learn_words(text, size, lowercase)
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase, "model_max_length": positions}
    with new_folder(folder, last="config.json") as partial:
        write_json(partial / "config.json", config | {"vocab_size": len(words)})
        write_json(partial / "tokenizer_config.json", tokenizer)
        (partial / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    return folder

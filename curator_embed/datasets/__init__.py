"""What the user holds: datasets of shards and pending steps."""

from curator_embed.datasets.image_text_pair import ImageTextPairDataset
from curator_embed.datasets.loading import load_embeddings

__all__ = ["ImageTextPairDataset", "load_embeddings"]

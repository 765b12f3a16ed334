"""Where samples come from: shards of encoded images, from disk or behind any fsspec URL."""

from curator_embed.sources.shard import Note, Sample, Shard

__all__ = ["Note", "Sample", "Shard"]

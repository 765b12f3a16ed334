"""The command ``curator-embed``. Nothing heavy is imported before a command needs it."""

from curator_embed.cli.main import main

__all__ = ["main"]

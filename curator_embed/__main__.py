"""``python -m curator_embed``: the command, where its script is not on the PATH."""

from curator_embed.cli import main

main()
